"""Figure 3: lengths of conversations."""

from __future__ import annotations

from experiments.common.item import Item, Panel

ITEM = Item(
    folder="fig03_conversations",
    title="Figure 3: rounds and histories of conversations",
    claim="rounds are short, histories long: half of them beyond 2,500 tokens",
    how="a: counted on ShareGPT where the data set is there (a prepared sample of a public copy, cut into "
    "fragments, is no "
    "guide to histories), else nothing. b: the histories of this project's synthetic conversations, which figure 9 "
    "uses "
    "and which are made to follow the paper's curve, so that agreeing only says that the generator works.",
    inputs=("history",),
    panels=(
        Panel(key="a", title="tokens of a round", x_label="", y_label="tokens"),
        Panel(key="b", title="histories", x_label="tokens of history", y_label="share", is_line=True),
    ),
)
