"""Restoration speed of three methods, alone on each machine."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from experiments.common.item import Context
from experiments.common.models import Deployment
from experiments.common.rows import Row
from experiments.common.runner import main
from experiments.common.simulator import speed, stored
from experiments.fig11_sensitivity.config import CONTEXTS, GPUS, ITEM, METHODS, SSDS, TOKENS, on_dram, on_ssds


def measure(context: Context) -> Iterator[Row]:
    """Panels a to i. The scale decides how many context lengths there are."""
    for panel, (model, gpus) in GPUS.items():
        for gpu in gpus:
            yield from _rows(panel, on_dram(model, gpu), gpu, TOKENS)
    for panel, (model, counts) in SSDS.items():
        for count in counts:
            yield from _rows(panel, on_ssds(model, count), count, TOKENS)
    num_steps = context.pick(smoke=2, small=4, paper=8)
    for panel, (model, longest) in CONTEXTS.items():
        deployment = on_ssds(model, 4)
        for step in range(num_steps + 1):
            tokens = 1024 + (longest - 1024) * step // num_steps // 64 * 64
            yield from _rows(panel, deployment, tokens, tokens)


def _rows(panel: str, deployment: Deployment, x: float | str, tokens: int) -> Iterator[Row]:
    for series in METHODS:
        yield Row(
            figure=ITEM.key,
            panel=panel,
            series=series,
            x=x,
            y=speed(deployment, series, tokens),
            unit="tokens/s",
            how="simulated",
            machine=deployment.platform,
            note=f"{tokens} tokens, stored as {stored(deployment, series).summary}; {deployment.basis}",
        )


if __name__ == "__main__":
    sys.exit(main([*sys.argv[1:], "--no-plots", ITEM.key]))
