"""L-Eval's mean lengths on the machine at hand, shorter, one request at a time: figures 4 and 10 share it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import fmean

from experiments.common.asking import Question, ask_histories, median_single
from experiments.common.bench import MODELS_DIR, Bench
from experiments.common.item import Context
from experiments.common.leval import task_requests
from experiments.common.models import Deployment
from experiments.common.served import Served, model_folder, serving
from experiments.common.workloads import LEVAL_TASKS

SERIES = ("Recomputation", "KV Offload", "HCache", "Ideal", "Auto")
SMOKE_SERIES = ("KV Offload", "HCache")
"""Each is a server that has to be started."""


def lengths_factor(context: Context) -> float:
    """On the paper's lengths."""
    return context.pick(smoke=1 / 32, small=1 / 4, paper=1.0)


def series_of(context: Context) -> tuple[str, ...]:
    """What is compared."""
    return SMOKE_SERIES if context.scale == "smoke" else SERIES


def questions_of(context: Context) -> dict[str, Question]:
    """The mean request of each task."""
    factor, made = lengths_factor(context), {}
    for idx, name in enumerate(LEVAL_TASKS):
        history, prompt = task_requests(name, None).pairs[0]
        made[name] = Question(
            context=idx, history_tokens=round(factor * history), prompt_tokens=max(1, round(factor * prompt))
        )
    return made


def served(bench: Bench, context: Context, series: str, deployment: Deployment) -> Served:
    """The server of one method, with room for every question at once."""
    tokens = sum(one.history_tokens + one.prompt_tokens + 64 for one in questions_of(context).values())
    return Served(
        model_dir=model_folder(bench.model, MODELS_DIR),
        series=series,
        num_blocks=max(128, 2 * tokens // 16),
        read_bytes_per_s=bench.read_bytes_per_s(deployment),
    )


def first_tokens(server: Served, context: Context) -> Iterator[tuple[str, float, str]]:
    """(task, seconds, a note), and in the end the mean of them all, as task `mean`."""
    repeats = context.pick(smoke=1, small=3, paper=9)
    times_s: Mapping[str, float] = {}
    speed = f"reads of {(server.read_bytes_per_s or 0) / 1e6:.0f} MB/s; " if server.is_emulated else ""
    questions = questions_of(context)
    with serving(server) as url:
        if server.method != "recompute":
            ask_histories(url, list(questions.values()))
        for task, question in questions.items():
            ttft_s, last = median_single(url, question, repeats)
            times_s = {**times_s, task: ttft_s}
            came = f"{question.history_tokens} + {question.prompt_tokens} tokens"
            report = f"{last.way}, restore {last.hcache.get('restore_ms', 0.0):.0f} ms"
            yield task, ttft_s, f"{came} over HTTP, {speed}{report}; median of {repeats}"
    yield "mean", fmean(times_s.values()), f"mean of three tasks over HTTP, {speed}median of {repeats} each"
