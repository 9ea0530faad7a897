"""Table 1: lengths of L-Eval."""

from __future__ import annotations

from experiments.common.item import Item, Panel

ITEM = Item(
    folder="tab01_leval",
    title="Table 1: lengths of L-Eval",
    claim="contexts are 5 to 16 thousand tokens long, questions and answers short",
    how="counted on the data set, Llama-2 tokens without the token that begins a text (the paper counts it).",
    panels=(Panel(title="mean tokens", x_label="part", y_label="tokens", log_y=True),),
    why="The paper's average is over 20 sub-tasks; two of them (codeU, narrative_qa) may be missing from a prepared "
    "file, and "
    "AVG then is over the others: contexts come out a third shorter, since these two are among the longest.",
)
