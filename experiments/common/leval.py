"""L-Eval as the paper asks it: a document that was seen before, a question, one request at a time."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from experiments.common.paper import paper_value
from experiments.common.serving import Server
from experiments.common.workloads import LEVAL_TASKS, MAX_CONTEXT_TOKENS, MissingData, leval_questions

MIXED_REQUESTS = 200


@dataclass(frozen=True, kw_only=True)
class Requests:
    """(history, prompt) in tokens, and where they come from."""

    pairs: tuple[tuple[int, int], ...]
    source: str

    def first_token_s(self, server: Server, series: str) -> float:
        """Mean over the requests."""
        return fmean(server.first_token_s(series, history, prompt) for history, prompt in self.pairs)


def task_requests(name: str, data: Path | None) -> Requests:
    """One of the paper's three tasks; without the data set its mean lengths in the paper's table 1."""
    try:
        questions = [one for one in leval_questions(data) if one.task == LEVAL_TASKS[name]]
    except MissingData:
        history, prompt = (round(paper_value("tab01", "", name, x)) for x in ("context", "input"))
        return Requests(pairs=((history, prompt),), source="mean lengths of the paper's table 1")
    pairs = tuple((min(one.context_tokens, MAX_CONTEXT_TOKENS), one.input_tokens) for one in questions)
    return Requests(pairs=pairs, source=f"lengths of {len(pairs)} L-Eval requests")


def mixed_requests(data: Path | None, *, seed: int) -> Requests:
    """Requests of all tasks, contexts cut at 16K. Raises MissingData."""
    questions = leval_questions(data)
    sample = random.Random(seed).sample(questions, min(MIXED_REQUESTS, len(questions)))
    pairs = tuple((min(one.context_tokens, MAX_CONTEXT_TOKENS), one.input_tokens) for one in sample)
    return Requests(pairs=pairs, source=f"lengths of {len(pairs)} L-Eval requests of all tasks, cut at 16K")


def mean_requests(data: Path | None) -> Requests:
    """What `mixed_requests` has, or the three tasks' means where there is no data set."""
    try:
        return mixed_requests(data, seed=0)
    except MissingData:
        pairs = tuple(pair for name in LEVAL_TASKS for pair in task_requests(name, None).pairs)
        return Requests(pairs=pairs, source="mean lengths of three tasks in the paper's table 1")
