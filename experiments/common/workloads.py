"""What is asked of a server: published traces from a folder, and synthetic sessions where they are not there.

The folder is `--data DIR` or $MII_HCACHE_DATA; it is searched with its subfolders for the files as published, plain or
gzipped: L-Eval's `<task>.jsonl`, ShareGPT's `sharegpt_gpt4.json`. Tokens are counted with a `tokenizer.json` in the
same folder (Llama-2's). Prepared counts are taken where they exist: `lengths_llama2.csv` (task, doc, query,
context_tokens, input_tokens, output_tokens) before L-Eval, `sample_lengths_llama2.jsonl` (id, turns) after ShareGPT.
No data is in this repository.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.common.paper import paper_points

MAX_CONTEXT_TOKENS = 16384
LEVAL_TASKS = {"Paper Assistant": "paper_assistant", "GSM-100": "gsm100", "QuALITY": "quality"}
"""The paper's names of three L-Eval tasks, and L-Eval's."""
MEAN_PROMPT_TOKENS, MEAN_OUTPUT_TOKENS = 66.8, 358.8
"""Of a ShareGPT4 round, as the paper prints them."""
_BIN_TOKENS = 512
_GOLDEN = (5**0.5 - 1) / 2
"""Multiples of it, modulo 1, lie evenly in [0, 1) however many there are."""


class MissingData(Exception):
    """A published file that is not in the folder. The message says what to put there."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round of a session."""

    history_tokens: int
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, kw_only=True)
class Session:
    """A conversation."""

    start_s: float
    rounds: tuple[Round, ...]


@dataclass(frozen=True, kw_only=True)
class Question:
    """One request of L-Eval: a document, and a question about it."""

    task: str
    doc: int
    context_tokens: int
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, kw_only=True)
class Document:
    """A document of L-Eval, in words."""

    text: str
    questions: tuple[tuple[str, str], ...]
    """Each with its reference answer."""


def data_folder(given: Path | None) -> Path | None:
    """What the command line says, else the environment."""
    from_environment = os.environ.get("MII_HCACHE_DATA")
    return given or (Path(from_environment) if from_environment else None)


def _found(data: Path | None, name: str) -> Path | None:
    """The first file of this name in the folder, plain or gzipped."""
    if data is None:
        return None
    return next((path for end in ("", ".gz") for path in sorted(data.rglob(name + end))), None)


def _text(path: Path) -> str:
    body = path.read_bytes()
    return (gzip.decompress(body) if path.suffix == ".gz" else body).decode("utf-8")


def token_counter(data: Path | None) -> Callable[[str], int] | None:
    """Counts tokens without BOS; None without a tokenizer in the folder."""
    path = _found(data, "tokenizer.json")
    if path is None:
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def leval_questions(data: Path | None) -> list[Question]:
    """Every request. Raises MissingData."""
    prepared = _found(data, "lengths_llama2.csv")
    if prepared is not None:
        rows = csv.DictReader(io.StringIO(_text(prepared)))
        return [Question(task=row["task"], **{name: int(row[name]) for name in _QUESTION_COUNTS}) for row in rows]
    count = token_counter(data)
    found = [(task, _found(data, f"{task}.jsonl")) for task in LEVAL_TASKS.values()]
    if count is None or any(path is None for _, path in found):
        raise MissingData(
            "needs L-Eval: put paper_assistant.jsonl, gsm100.jsonl, quality.jsonl (Hugging Face L4NLP/LEval) and a "
            "Llama-2 tokenizer.json in the folder that --data names"
        )
    return [question for task, path in found if path is not None for question in _leval_task(task, path, count)]


_QUESTION_COUNTS = ("doc", "context_tokens", "input_tokens", "output_tokens")


def _leval_task(task: str, path: Path, count: Callable[[str], int]) -> Iterator[Question]:
    for doc, line in enumerate(_text(path).splitlines()):
        body = json.loads(line)
        context_tokens = count(body["input"])
        for instruction, output in zip(body["instructions"], body["outputs"], strict=True):
            yield Question(
                task=task,
                doc=doc,
                context_tokens=context_tokens,
                input_tokens=count(instruction),
                output_tokens=count(output),
            )


def leval_documents(data: Path | None, task: str) -> list[Document]:
    """One task's documents, by L-Eval's name of the task. Raises MissingData."""
    path = _found(data, f"{task}.jsonl")
    if path is None:
        raise MissingData(f"needs L-Eval: put {task}.jsonl (Hugging Face L4NLP/LEval) in the folder that --data names")
    bodies = [json.loads(line) for line in _text(path).splitlines()]
    return [
        Document(text=body["input"], questions=tuple(zip(body["instructions"], body["outputs"], strict=True)))
        for body in bodies
    ]


def sharegpt_turns(data: Path | None) -> list[list[tuple[str, int]]]:
    """Of each conversation its turns: (human or gpt, tokens). Raises MissingData."""
    path, count = _found(data, "sharegpt_gpt4.json"), token_counter(data)
    if path is not None and count is not None:
        bodies: list[dict[str, Any]] = json.loads(_text(path))
        turns = [body.get("conversations") or body.get("items") or [] for body in bodies]
        return [[(turn["from"], count(turn["value"])) for turn in one] for one in turns]
    prepared = _found(data, "sample_lengths_llama2.jsonl")
    if prepared is None:
        raise MissingData(
            "needs ShareGPT4: put sharegpt_gpt4.json (Hugging Face openchat/openchat_sharegpt4_dataset) and a Llama-2 "
            "tokenizer.json in the folder that --data names"
        )
    return [[(who, tokens) for who, tokens in json.loads(line)["turns"]] for line in _text(prepared).splitlines()]


def synthetic_histories(num_requests: int, *, seed: int) -> list[int]:
    """Histories of single requests, drawn from the paper's figure 3b. Synthetic: say so where they are used."""
    rng = random.Random(seed)
    tokens, shares = zip(*paper_points("fig03", "b", "history"), strict=True)
    return [_inverse(tokens, shares, rng.random()) for _ in range(num_requests)]


def _inverse(tokens: Sequence[float], shares: Sequence[float], share: float) -> int:
    upper = min(max(1, bisect_left(shares, share)), len(shares) - 1)
    low, high = shares[upper - 1], shares[upper]
    part = (share - low) / (high - low) if high > low else 1.0
    return round(tokens[upper - 1] + part * (tokens[upper] - tokens[upper - 1]))


def survival() -> list[float]:
    """For each 512 tokens of history: the share of sessions that get there, if their rounds are to have figure 3b's
    histories. Rounds are as dense at a length as there are sessions that reach it, so it is the density of 3b, made to
    fall."""
    points = paper_points("fig03", "b", "history")
    tokens, shares = zip(*points, strict=True)

    def cdf(at: float) -> float:
        upper = min(max(1, bisect_right(tokens, at)), len(tokens) - 1)
        part = (at - tokens[upper - 1]) / (tokens[upper] - tokens[upper - 1])
        return shares[upper - 1] + min(1.0, max(0.0, part)) * (shares[upper] - shares[upper - 1])

    density = [cdf(start + _BIN_TOKENS) - cdf(start) for start in range(0, MAX_CONTEXT_TOKENS, _BIN_TOKENS)]
    falling: list[float] = []
    for idx in range(len(density)):
        falling.append(max(density[idx:]))
    return [value / falling[0] for value in falling]


def synthetic_rounds(rng: random.Random, reach: Sequence[float]) -> tuple[Round, ...]:
    """One session from its first round on; prompts and outputs are exponential with the paper's means."""
    rounds: list[Round] = []
    history, ends = 0, rng.random()
    while True:
        prompt = max(1, min(1200, round(rng.expovariate(1 / MEAN_PROMPT_TOKENS))))
        output = max(1, min(1200, round(rng.expovariate(1 / MEAN_OUTPUT_TOKENS))))
        if history + prompt + output > MAX_CONTEXT_TOKENS:
            break
        rounds.append(Round(history_tokens=history, prompt_tokens=prompt, output_tokens=output))
        history += prompt + output
        if history >= MAX_CONTEXT_TOKENS or reach[history // _BIN_TOKENS] < ends:
            break
    return tuple(rounds)


def synthetic_sessions(num_rounds: int, rounds_per_s: float, *, seed: int) -> list[Session]:
    """Poisson sessions that hold `num_rounds` rounds or a few more, at the rate that asks `rounds_per_s` of the server.
    The rounds of a seed are the same at every rate."""
    rng, reach = random.Random(seed), survival()
    sessions: list[tuple[Round, ...]] = []
    while sum(map(len, sessions)) < num_rounds:
        sessions.append(synthetic_rounds(rng, reach))
    sessions_per_s = rounds_per_s * len(sessions) / sum(map(len, sessions))
    arrivals, start_s, timed = random.Random(seed + 1), 0.0, []
    for rounds in sessions:
        start_s += arrivals.expovariate(sessions_per_s)
        timed.append(Session(start_s=start_s, rounds=rounds))
    return timed


def midway_sessions(num_rounds: int, rounds_per_s: float, *, rounds_each: int, seed: int) -> list[Session]:
    """Poisson sessions of at most `rounds_each` rounds that go on with a conversation from a round that was drawn from
    all rounds: their histories are figure 3b's from the first second on, without waiting for them to grow. Few sessions
    are spread over its short and long ones as evenly as many. The rounds of a seed are the same at every rate."""
    rng, reach = random.Random(seed), survival()
    conversations = [synthetic_rounds(rng, reach) for _ in range(max(400, num_rounds))]
    starts = [(idx, start) for idx, rounds in enumerate(conversations) for start in range(len(rounds))]
    starts.sort(key=lambda place: conversations[place[0]][place[1]].history_tokens)
    chosen: list[tuple[Round, ...]] = []
    share = rng.random()
    while sum(map(len, chosen)) < num_rounds:
        share = (share + _GOLDEN) % 1
        idx, start = starts[int(share * len(starts))]
        left = num_rounds - sum(map(len, chosen))
        chosen.append(conversations[idx][start : start + min(rounds_each, left)])
    sessions_per_s = rounds_per_s * len(chosen) / num_rounds
    arrivals, start_s, timed = random.Random(seed + 1), 0.0, []
    for rounds in chosen:
        start_s += arrivals.expovariate(sessions_per_s)
        timed.append(Session(start_s=start_s, rounds=rounds))
    return timed


def scaled(
    sessions: Sequence[Session], *, tokens: float = 1.0, time: float = 1.0, least_output_tokens: int = 1
) -> list[Session]:
    """The same sessions with lengths and start times multiplied, so that they suit a small model or a slow machine.
    Nothing gets shorter than a token, and a history is still what was said before it."""
    made = []
    for session in sessions:
        history = round(tokens * session.rounds[0].history_tokens) if session.rounds else 0
        rounds = []
        for one in session.rounds:
            prompt = max(1, round(tokens * one.prompt_tokens))
            output = max(least_output_tokens, round(tokens * one.output_tokens))
            rounds.append(Round(history_tokens=history, prompt_tokens=prompt, output_tokens=output))
            history += prompt + output
        made.append(Session(start_s=time * session.start_s, rounds=tuple(rounds)))
    return made
