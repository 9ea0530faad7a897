"""A follower's part of a put is kept, or being written, or gone: at no moment something else."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind
from mii_hcache.runtime.parts import PartsSink
from mii_hcache.runtime.peers import WritePart, Written
from mii_hcache.runtime.snapshot import Snapshot, SpanPut
from mii_hcache.runtime.stats import Counters
from tests.runtime.kit import GIVE_UP_S, geometry_of, path, span_record, wait_until


class _Files:
    """A disk that writes when it is let."""

    def __init__(self) -> None:
        self.gate = threading.Event()

    def write(self, payloads: Any, chunks: Any) -> list[int]:
        assert self.gate.wait(GIVE_UP_S)
        return [0] * len(chunks)


def _put(put_id: int) -> SpanPut:
    record = span_record(path(put_id, 0, SPAN_TOKENS), ChunkKind.HIDDEN, geometry_of())
    return SpanPut(record=record, rows=list(torch.zeros(2, SPAN_TOKENS, 4)), put_id=put_id)


def _interrupted(call: Callable[..., None], then: Callable[[], None]) -> tuple[Callable[..., None], threading.Thread]:
    """`call`, before which another thread has the time to do something, if nothing holds it up."""
    other = threading.Thread(target=then, daemon=True)

    def interrupted(*args: Any) -> None:
        other.start()
        other.join(0.05)
        call(*args)

    return interrupted, other


@pytest.mark.parametrize("is_asked_first", [False, True])
def test_who_drops_a_part_that_is_about_to_be_written_finds_it(is_asked_first):
    """Else nobody would take the place of a thread that hangs with it, and it would be remembered for ever."""
    files, answers = _Files(), []
    sink = PartsSink(counters=Counters(), files=files, num_threads=1)  # type: ignore[arg-type]
    sink._write_later, dropping = _interrupted(sink._write_later, lambda: sink.drop(1))  # type: ignore[method-assign]
    question = WritePart(put_id=1, payloads=())
    if is_asked_first:
        sink.ask(question, answers.append)
        sink.submit(Snapshot(whole=[_put(1)]))
    else:
        sink.submit(Snapshot(whole=[_put(1)]))
        wait_until(lambda: sink.num_kept == 1)
        sink.ask(question, answers.append)
    wait_until(lambda: bool(sink._writing))
    dropping.join(GIVE_UP_S)
    assert not sink._dropped
    files.gate.set()
    wait_until(lambda: bool(answers))
    assert isinstance(answers[0], Written)
    sink.stop()
