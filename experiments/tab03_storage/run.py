"""Bytes that each method stores for a token."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from experiments.common.item import Context
from experiments.common.models import MODELS, main_deployment
from experiments.common.rows import Row
from experiments.common.runner import main
from experiments.common.simulator import stored
from experiments.tab03_storage.config import ITEM, METHODS


def measure(_: Context) -> Iterator[Row]:
    """The same at every scale."""
    for model in MODELS:
        deployment = main_deployment(model)
        for series in METHODS:
            plan = stored(deployment, series)
            yield Row(
                figure=ITEM.key,
                series=series,
                x=model,
                y=plan.bytes_per_token(deployment.geometry),
                unit="bytes",
                how="simulated",
                machine=deployment.platform,
                note=f"schedule {plan.summary}. {plan.note}".strip(),
            )


if __name__ == "__main__":
    sys.exit(main([*sys.argv[1:], "--no-plots", ITEM.key]))
