"""One request at a time, each behind a history that was asked for before: time to first token over HTTP."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from experiments.common.load import FIRST_ID, VOCABULARY
from experiments.common.load_client import Answer, Client

ANSWER_TOKENS = 2


@dataclass(frozen=True, kw_only=True)
class Single:
    """What one request took."""

    ttft_s: float
    """Sent to first token."""
    hcache: Mapping[str, Any]
    """The server's report."""

    @property
    def way(self) -> str:
        """How its history came: resident, the restored kinds, or prefill."""
        if self.hcache.get("resident_tokens"):
            return "resident"
        return str(self.hcache.get("method")) if self.hcache.get("restored_tokens") else "prefill"


@dataclass(frozen=True, kw_only=True)
class Question:
    """A request behind a history."""

    context: int
    """Questions of one context have the same history."""
    history_tokens: int
    prompt_tokens: int


def _ids(seed: str, count: int) -> list[int]:
    return random.Random(seed).choices(range(FIRST_ID, VOCABULARY), k=count)


async def _ask(client: Client, question: Question, name: str) -> Single:
    history = _ids(f"context/{question.context}", question.history_tokens)
    answer = await client.ask([*history, *_ids(f"{name}/{question.context}", question.prompt_tokens)], ANSWER_TOKENS)
    await client.until_saved()
    return Single(ttft_s=_checked(answer).token_times_s[0] - answer.sent_s, hcache=answer.hcache)


def _checked(answer: Answer) -> Answer:
    if answer.error:
        raise RuntimeError(f"the server did not answer: {answer.error}")
    return answer


async def _histories(url: str, questions: Sequence[Question]) -> None:
    async with Client(url) as client:
        for one in {question.context: question for question in questions}.values():
            _checked(await client.ask(_ids(f"context/{one.context}", one.history_tokens), 1))
        await client.until_saved()


async def _in_turn(url: str, questions: Sequence[Question], name: str) -> list[Single]:
    async with Client(url) as client:
        return [await _ask(client, question, f"{name}/{place}") for place, question in enumerate(questions)]


def ask_histories(url: str, questions: Sequence[Question]) -> None:
    """Each context once, so that a server has it saved or resident. Raises as the next one does."""
    asyncio.run(_histories(url, questions))


def ask_in_turn(url: str, questions: Sequence[Question], *, name: str = "") -> list[Single]:
    """Every question when the one before is over and saved. Questions of another `name` are other ones behind the same
    histories. Raises RuntimeError, TimeoutError, or what httpx raises when there is no server."""
    return asyncio.run(_in_turn(url, questions, name))


def median_single(url: str, question: Question, repeats: int) -> tuple[float, Single]:
    """Median time to first token of `repeats` questions behind one history, and the last of them. One more goes before,
    which touches buffers and does not count."""
    _, *counted = ask_in_turn(url, [question] * (1 + repeats))
    return median(one.ttft_s for one in counted), counted[-1]
