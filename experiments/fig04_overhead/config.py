"""Figure 4: time to first token when the history has to come back, against when it never left."""

from __future__ import annotations

from experiments.common.item import Check, Item, Panel

METHODS = ("Recomputation", "KV Offload", "HCache", "Ideal")
"""HCache is not in the paper's figure."""

HERE_PANEL = Panel(
    key="here",
    title="L-Eval",
    x_label="balanced like",
    y_label="s",
    here_of="",
    relative_to="Ideal",
    image="fig04_overhead_here",
)
"""Runs on the machine at hand."""

ITEM = Item(
    folder="fig04_overhead",
    title="Figure 4: time to first token on L-Eval, against state that never left",
    claim="recomputation takes 20 to 26 times, K and V from SSDs 6.4 to 13 times as long as state that never left",
    how="simulated: one request at a time; mean over L-Eval lengths where the data set is there, else the mean "
    "lengths in "
    "table 1. One constant for each model is fitted to another figure of the paper (figure 14, OPT-30B figure 9).",
    here="a server in a process of its own, asked over HTTP one request at a time; a random Llama of 250 million "
    "parameters, the tasks' mean lengths divided by 4, reads slowed down so that bringing back K and V costs as much "
    "over computing as on each of the paper's platforms.",
    panels=(Panel(title="L-Eval", x_label="model", y_label="time to first token, s"), HERE_PANEL),
    checks=(
        Check(text="recomputation over ideal", numerator="Recomputation", denominator="Ideal", low=20.0, high=26.0),
        Check(
            text="KV offload over ideal",
            numerator="KV Offload",
            denominator="Ideal",
            low=6.4,
            high=13.0,
            why="Ratios to Ideal depend on one prefill of some 50 tokens, most of which is the engine's own "
            "constant; the "
            "paper's is 35 to 54 ms here and 26 to 44 ms in its figure 10. Ours is lower, so both ratios come out "
            "higher; "
            "the difference column has the times themselves.",
        ),
        Check(
            text="recomputation over ideal, this machine",
            numerator="Recomputation",
            denominator="Ideal",
            low=20.0,
            high=26.0,
            panels=(HERE_PANEL.key,),
        ),
        Check(
            text="KV offload over ideal, this machine",
            numerator="KV Offload",
            denominator="Ideal",
            low=6.4,
            high=13.0,
            panels=(HERE_PANEL.key,),
        ),
    ),
)
