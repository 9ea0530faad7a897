"""Mean time to first token of every method and model."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from experiments.common.item import Context
from experiments.common.leval import mean_requests
from experiments.common.models import MODELS
from experiments.common.rows import Row
from experiments.common.runner import main
from experiments.common.servers import BASIS, server_of
from experiments.fig04_overhead.config import ITEM, METHODS


def measure(context: Context) -> Iterator[Row]:
    """The same at every scale."""
    requests = mean_requests(context.data)
    for model in MODELS:
        server = server_of(model)
        for series in METHODS:
            yield Row(
                figure=ITEM.key,
                series=series,
                x=model,
                y=requests.first_token_s(server, series),
                unit="s",
                how="simulated",
                machine=server.deployment.platform,
                note=f"{requests.source}; {BASIS}",
            )


if __name__ == "__main__":
    sys.exit(main([*sys.argv[1:], "--no-plots", ITEM.key]))
