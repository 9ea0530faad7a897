"""Mean lengths of ShareGPT's messages, and the distribution of synthetic histories."""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Iterator
from statistics import fmean

from experiments.common.item import Context
from experiments.common.rows import Row
from experiments.common.runner import main
from experiments.common.workloads import MissingData, sharegpt_turns, synthetic_sessions
from experiments.fig03_conversations.config import ITEM


def measure(context: Context) -> Iterator[Row]:
    """The scale decides how many synthetic rounds there are."""
    speakers = {"prompt": "human", "output": "gpt"}
    try:
        turns = [turn for conversation in sharegpt_turns(context.data) for turn in conversation]
        means = {series: fmean(count for who, count in turns if who == name) for series, name in speakers.items()}
        note = f"{len(turns)} messages"
    except MissingData as reason:
        means, note = dict.fromkeys(speakers), str(reason)
    for series, y in means.items():
        yield Row(figure=ITEM.key, panel="a", series=series, x="mean", y=y, unit="tokens", how="measured", note=note)
    num_rounds = context.pick(smoke=500, small=5000, paper=50000)
    sessions = synthetic_sessions(num_rounds, 1.0, seed=0)
    histories = sorted(one.history_tokens for session in sessions for one in session.rounds)
    for x in range(0, 16385, 512):
        yield Row(
            figure=ITEM.key,
            panel="b",
            series="history",
            x=x,
            y=bisect_right(histories, x) / len(histories),
            unit="share",
            how="simulated",
            note=f"{len(histories)} synthetic rounds, seeded",
        )


if __name__ == "__main__":
    sys.exit(main([*sys.argv[1:], "--no-plots", ITEM.key]))
