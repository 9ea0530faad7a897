"""The objects of OpenAI's API that this server sends, and `hcache`: where the prompt's tokens came from.

With several prompts in one request, `usage` and the counts of the reply's `hcache` are sums, its times are the longest,
and each choice has an `hcache` of its own.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from mii_hcache.runtime.generation import RestoreReport
from mii_hcache.serve.generations import Finished
from mii_hcache.serve.growing import Piece
from mii_hcache.serve.logprobs import LogprobsJson, Scored

Json = dict[str, Any]


def sse(event: Json | str) -> str:
    """One server-sent event."""
    data = event if isinstance(event, str) else json.dumps(event, ensure_ascii=False, separators=(",", ":"))
    return f"data: {data}\n\n"


def usage_of(finished: Sequence[Finished]) -> Json:
    """OpenAI's `usage`."""
    prompt = sum(len(end.prompt.token_ids) for end in finished)
    completion = sum(end.num_tokens for end in finished)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(end.result.report.cached_tokens for end in finished)},
    }


def hcache_of(finished: Sequence[Finished]) -> Json:
    """`hcache` of a reply."""
    return _joined([end.result.report for end in finished]).to_dict()


def _joined(reports: Sequence[RestoreReport]) -> RestoreReport:
    if len(reports) == 1:
        return reports[0]
    ttfts = [report.ttft_ms for report in reports if report.ttft_ms is not None]
    return RestoreReport(
        resident_tokens=sum(report.resident_tokens for report in reports),
        restored_tokens=sum(report.restored_tokens for report in reports),
        recomputed_tokens=sum(report.recomputed_tokens for report in reports),
        restored_from=_union([report.restored_from for report in reports]),
        method=_union([report.method for report in reports]),
        restore_ms=max(report.restore_ms for report in reports),
        planned_ms=max((report.planned_ms for report in reports if report.planned_ms is not None), default=None),
        prefill_tokens=sum(report.prefill_tokens for report in reports),
        ttft_ms=max(ttfts, default=None),
        miss_reason=_union([report.miss_reason for report in reports]),
    )


def _union(names: Sequence[str | None]) -> str | None:
    """`a+b` of `a`, `None` and `b+a`."""
    parts = {part for name in names if name is not None for part in name.split("+")}
    return "+".join(sorted(parts)) or None


class Replies:
    """Builds what is sent for one request: a whole reply, or the chunks of a stream."""

    def __init__(
        self,
        *,
        chat: bool,
        model: str,
        with_usage: bool,
        logprobs: LogprobsJson | None = None,
        prompt_ids: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """`with_usage`: of a stream (`stream_options.include_usage`); a whole reply always has it. `logprobs`: how
        they are written, when they are wanted. `prompt_ids`: of each prompt, when token ids are wanted; they stand
        where vLLM puts them: in the reply of a chat, in the choice of a completion."""
        self.request_id = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex
        self._chat = chat
        self._model = model
        self._with_usage = with_usage
        self._logprobs = logprobs
        self._prompt_ids = prompt_ids
        self._created = int(time.time())

    def whole(self, finished: Sequence[Finished]) -> Json:
        """Not streamed."""
        choices = []
        for end in sorted(finished, key=lambda end: end.answer_idx):
            before, scored = ("", end.scored) if end.echo is None else (end.echo.text, [*end.echo.scored, *end.scored])
            content: Json = {"text": before + end.text}
            if self._chat:
                content = {"message": {"role": "assistant", "content": end.text, "refusal": None}}
            choices.append(self._choice(end.answer_idx, content, scored, finish_reason=end.finish_reason))
            if end.token_ids is not None:
                choices[-1] |= {"token_ids": list(end.token_ids), **self._prompt_of_choice(end.answer_idx)}
            if len(finished) > 1:
                choices[-1]["hcache"] = end.result.report.to_dict()
        object_name = "chat.completion" if self._chat else "text_completion"
        reply = self._reply(object_name, choices) | self._prompt_of_chat()
        return reply | {"usage": usage_of(finished), "hcache": hcache_of(finished)}

    def opening_chunks(self, answer_idx: int) -> list[Json]:
        """Before the first text of an answer."""
        if self._chat:
            opening = self._choice(answer_idx, {"delta": {"role": "assistant", "content": ""}})
            return [self._chunk([opening]) | self._prompt_of_chat()]
        if self._prompt_ids is None:
            return []
        return [self._chunk([self._choice(answer_idx, {"text": ""}) | self._prompt_of_choice(answer_idx)])]

    def piece_chunk(self, piece: Piece) -> Json:
        """Text."""
        content = {"delta": {"content": piece.text}} if self._chat else {"text": piece.text}
        choice = self._choice(piece.answer_idx, content, piece.scored or None)
        if self._prompt_ids is not None:
            choice["token_ids"] = list(piece.token_ids)
        return self._chunk([choice])

    def closing_chunks(self, finished: Sequence[Finished], *, num_answers: int) -> list[Json]:
        """After the last text of `finished[-1]`. The very last chunk carries the reply's `hcache`."""
        end = finished[-1]
        choice = self._choice(
            end.answer_idx, {"delta": {}} if self._chat else {"text": ""}, finish_reason=end.finish_reason
        )
        if num_answers > 1:
            choice["hcache"] = end.result.report.to_dict()
        chunks = [self._chunk([choice])]
        if len(finished) == num_answers:
            if self._with_usage:
                chunks.append(self._chunk([]) | {"usage": usage_of(finished)})
            chunks[-1]["hcache"] = hcache_of(finished)
        return chunks

    def _prompt_of_chat(self) -> Json:
        return {"prompt_token_ids": list(self._prompt_ids[0])} if self._chat and self._prompt_ids is not None else {}

    def _prompt_of_choice(self, answer_idx: int) -> Json:
        if self._chat or self._prompt_ids is None:
            return {}
        return {"prompt_token_ids": list(self._prompt_ids[answer_idx])}

    def _choice(
        self,
        answer_idx: int,
        content: Mapping[str, Any],
        scored: Sequence[Scored] | None = None,
        *,
        finish_reason: str | None = None,
    ) -> Json:
        """`scored`: None where logprobs do not belong, wanted or not."""
        logprobs = None if self._logprobs is None or scored is None else self._logprobs(scored)
        return {"index": answer_idx, **content, "logprobs": logprobs, "finish_reason": finish_reason}

    def _chunk(self, choices: list[Json]) -> Json:
        chunk = self._reply("chat.completion.chunk" if self._chat else "text_completion", choices)
        return chunk | {"usage": None} if self._with_usage else chunk

    def _reply(self, object_name: str, choices: list[Json]) -> Json:
        return {
            "id": self.request_id,
            "object": object_name,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }
