"""Figure 1: what each method computes and transfers, in the paper a sketch with two ratios."""

from __future__ import annotations

from experiments.common.item import Item, Panel

METHODS = ("Recomputation", "KV Offload", "HCache")
TOKENS = 1024
MODEL = "Llama2-7B"

HERE = Panel(
    key="here", title="this machine", x_label="resource", y_label="a token of a layer", here_of="", image="fig01_here"
)

ITEM = Item(
    folder="fig01_methods",
    title="Figure 1: what restoring costs, relative to hidden states",
    claim="hidden states take 1/6 of the computing of recomputation and 1/2 of the transfer of K and V",
    how="arithmetic: FLOPs and bytes of a token in a layer of Llama2-7B with 1,024 tokens of context, over those of "
    "hidden states.",
    panels=(Panel(title=MODEL, x_label="resource", y_label="times that of hidden states"), HERE),
    here="seconds as the profiler measures them on a small model (copying K and V into blocks costs a CPU something), "
    "and bytes.",
    why="The ratio of computing grows with length, as 6 + N/(2D) where the paper has 6 + N/(4D): its equation 8 counts "
    "half of causal attention. The ratio of bytes is 2 for multi-head attention only; with grouped heads K and V "
    "are the "
    "smaller.",
)
