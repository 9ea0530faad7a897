"""Time to first token of each task, model and method."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from experiments.common.item import Context
from experiments.common.leval import Requests, mixed_requests, task_requests
from experiments.common.rows import Row
from experiments.common.runner import main
from experiments.common.servers import BASIS, server_of
from experiments.common.workloads import LEVAL_TASKS, MissingData
from experiments.fig10_leval.config import ITEM, METHODS, PANELS


def measure(context: Context) -> Iterator[Row]:
    """The same at every scale."""
    tasks: dict[str, Requests | None] = {name: task_requests(name, context.data) for name in LEVAL_TASKS}
    missing = ""
    try:
        tasks["Mixed"] = mixed_requests(context.data, seed=0)
    except MissingData as reason:
        tasks["Mixed"], missing = None, str(reason)
    for panel, model in PANELS.items():
        server = server_of(model)
        for task, requests in tasks.items():
            for series in METHODS:
                yield Row(
                    figure=ITEM.key,
                    panel=panel,
                    series=series,
                    x=task,
                    y=requests.first_token_s(server, series) if requests else None,
                    unit="s",
                    how="simulated",
                    machine=server.deployment.platform,
                    note=f"{requests.source}; {BASIS}" if requests else missing,
                )


if __name__ == "__main__":
    sys.exit(main([*sys.argv[1:], "--no-plots", ITEM.key]))
