"""Figure 9: time to first token and between tokens under load, conversations of many rounds."""

from __future__ import annotations

from experiments.common.item import Check, Item, Panel

METHODS = ("Recomputation", "KV Offload", "HCache", "Ideal")
LOADS: dict[str, tuple[float, ...]] = {
    "Llama2-7B": (0.1, 0.4, 0.7, 1.0, 1.2),
    "Llama2-13B": (0.05, 0.1, 0.15, 0.2, 0.225),
    "OPT-30B": (0.2, 0.6, 1.0, 1.2, 1.3),
}
"""Rounds per second."""
TTFT_PANELS = dict(zip("abc", LOADS, strict=True))
TBT_PANELS = dict(zip("def", LOADS, strict=True))

_WORDS = {"x_label": "rounds/s", "is_line": True}

_HERE = {**_WORDS, "x_label": "the paper's rounds/s"}
HERE_TTFT = Panel(key="a-here", title="beside 7B, first token", y_label="s", here_of="a", image="fig09_here", **_HERE)
HERE_TBT = Panel(
    key="d-here",
    title="beside 7B, between tokens",
    y_label="ms",
    y_factor=1e3,
    here_of="d",
    relative_to="Ideal",
    image="fig09_here",
    **_HERE,
)
"""These run on the machine at hand."""

ITEM = Item(
    folder="fig09_sharegpt",
    title="Figure 9: conversations under load",
    claim="under load HCache answers 1.27 to 1.90 times sooner than KV offload, 2.21 to 3.57 times than recomputation",
    how="simulated in discrete events: Poisson sessions, 30 s between rounds, a step budget of 512 tokens, state "
    "evicted "
    "after every round. Conversations are synthetic: histories as in the paper's figure 3b, prompts and outputs "
    "exponential with the paper's means. Medians of time to first token, means of time between tokens.",
    here="a server in a process of its own, conversations over HTTP (experiments/common/load.py): a random Llama of "
    "250 million parameters, lengths divided by 12, 1.5 s to think, reads slowed down so that bringing back K and V "
    "costs as much over computing as on the paper's platform. A load of the paper is divided by how many times longer "
    "this machine takes to compute a mean round. Sessions begin in the middle of a conversation whose history was "
    "saved before. Auto is ours.",
    panels=(
        *(
            Panel(key=key, title=f"{model}, first token", y_label="s", log_y=True, image="fig09_ttft", **_WORDS)
            for key, model in TTFT_PANELS.items()
        ),
        *(
            Panel(key=key, title=f"{model}, between tokens", y_label="ms", y_factor=1e3, image="fig09_tbt", **_WORDS)
            for key, model in TBT_PANELS.items()
        ),
        HERE_TTFT,
        HERE_TBT,
    ),
    checks=(
        Check(
            text="first token: KV offload over HCache",
            numerator="KV Offload",
            denominator="HCache",
            low=1.27,
            high=1.90,
            panels=tuple(TTFT_PANELS),
            why="The 1.90 of the paper's text is not in its figure, whose largest is 1.79.",
        ),
        Check(
            text="first token: recomputation over HCache",
            numerator="Recomputation",
            denominator="HCache",
            low=2.21,
            high=3.57,
            panels=tuple(TTFT_PANELS),
        ),
        Check(
            text="between tokens: HCache over ideal",
            numerator="HCache",
            denominator="Ideal",
            low=1.00,
            high=1.04,
            tolerance=0.01,
            panels=tuple(TBT_PANELS),
            why="The paper's text says at most 4 % more time between tokens; its figure shows 5.0 % (7B) and 5.3 % "
            "(30B).",
        ),
        Check(
            text="first token: KV offload over HCache, this machine",
            numerator="KV Offload",
            denominator="HCache",
            low=1.27,
            high=1.90,
            panels=(HERE_TTFT.key,),
        ),
        Check(
            text="first token: recomputation over HCache, this machine",
            numerator="Recomputation",
            denominator="HCache",
            low=2.21,
            high=3.57,
            panels=(HERE_TTFT.key,),
        ),
        Check(
            text="between tokens: HCache over ideal, this machine",
            numerator="HCache",
            denominator="Ideal",
            low=1.00,
            high=1.04,
            tolerance=0.01,
            panels=(HERE_TBT.key,),
            why="On a CPU a restore's computing and copying, the saver's threads and the client take the cores that "
            "decode; a GPU has copy engines and idle host cores for that.",
        ),
    ),
    why="The paper calls its load sessions per second. At 1.2 new sessions a second, of several rounds each, the "
    "GPU would "
    "need several times the KV memory that it has, so we take it for rounds per second. It does not say whether it "
    "plots means or medians; its values below saturation are its own restoration speeds at the median history (2.6K "
    "tokens), "
    "while the mean of figure 3b is 4.0K, so we show medians. Our server saturates earlier than the "
    "paper's: 7B near 0.8 rounds/s where the paper has 1.1 to 1.2, 13B near 0.13 where it has 0.22; our histories "
    "may be "
    "longer, and we set aside memory for the whole output. Beyond that the queue still grows when a run ends, so those "
    "points are not steady, and ratios there mean nothing: compare the lower loads only. Restores take GPU time "
    "ahead of steps, as a phase of their own would.",
)
