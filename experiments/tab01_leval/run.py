"""Mean lengths by task, and their mean over tasks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from statistics import fmean

from experiments.common.item import Context
from experiments.common.rows import Row
from experiments.common.runner import main
from experiments.common.workloads import LEVAL_TASKS, Question, leval_questions
from experiments.tab01_leval.config import ITEM


def means(questions: list[Question]) -> dict[str, float]:
    """Documents count once, questions each."""
    contexts = {one.doc: one.context_tokens for one in questions}
    return {
        "context": fmean(contexts.values()),
        "input": fmean(one.input_tokens for one in questions),
        "output": fmean(one.output_tokens for one in questions),
    }


def measure(context: Context) -> Iterator[Row]:
    """The same at every scale. Raises MissingData."""
    by_task: dict[str, list[Question]] = {}
    for one in leval_questions(context.data):
        by_task.setdefault(one.task, []).append(one)
    tables = {name: means(by_task[task]) for name, task in LEVAL_TASKS.items()}
    every = [means(questions) for questions in by_task.values()]
    if len(every) > len(LEVAL_TASKS):
        tables["AVG"] = {part: fmean(one[part] for one in every) for part in every[0]}
    for series, table in tables.items():
        for x, y in table.items():
            yield Row(
                figure=ITEM.key,
                series=series,
                x=x,
                y=y,
                unit="tokens",
                how="measured",
                machine="any: counts",
                note=f"{len(by_task)} sub-tasks in the data folder",
            )


if __name__ == "__main__":
    sys.exit(main([*sys.argv[1:], "--no-plots", ITEM.key]))
