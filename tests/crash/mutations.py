"""Defects on purpose: a campaign that finds none of them proves nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from mii_hcache.storage import segment, segments, span_reader, state_dir
from mii_hcache.storage.index import FileIndex


def _no_payload_check() -> Any:
    """Reads believe the payload, whatever its checksum."""

    def finish(self: Any, arriving: Any, idx: int, span: Any, chunk_idx: int, read: Any) -> str | None:
        try:
            arriving.finish(idx, self._header_of(span, chunk_idx))
        except span_reader.StaleSlotError:
            return "missing"
        except (span_reader.CorruptChunkError, OSError):
            return "corrupt"
        return None

    return mock.patch.object(span_reader.SpanReader, "_finish", finish)


def _no_sync() -> Any:
    """Rows are committed over payloads that were never synced."""
    return mock.patch.object(segments.Segments, "sync", lambda self, numbers: {})


def _no_dir_sync() -> Any:
    """New files are not made durable in their directory."""
    stack = contextlib.ExitStack()
    for module in (state_dir, segment):
        stack.enter_context(mock.patch.object(module, "sync_dir", lambda path: None))
    return stack


def _early_reuse() -> Any:
    """Slots of a removed span are reused before its row's deletion is committed."""
    remove, free = FileIndex._remove, FileIndex._free_when_unused
    reused = set()

    def removed(self: Any, span: Any, reason: str) -> bool:
        done = remove(self, span, reason)
        if span.places and not span.num_readers:
            self.pool.give(span.places)
            reused.add(span)
        return done

    def freed(self: Any, span: Any) -> None:
        if span in reused:
            return
        free(self, span)

    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(FileIndex, "_remove", removed))
    stack.enter_context(mock.patch.object(FileIndex, "_free_when_unused", freed))
    return stack


def _forgotten_deletions() -> Any:
    """Deletions never reach the catalog."""
    take_work = FileIndex.take_work

    def taken(self: Any, **what: bool) -> Any:
        work = take_work(self, **what)
        work.drop.clear()
        return work

    return mock.patch.object(FileIndex, "take_work", taken)


def _short_writes() -> Any:
    """What the kernel wrote of a write is not looked at."""
    import os

    from mii_hcache.storage import disk_io

    def write_some(fd: int, buffers: Any, offset: int) -> None:
        os.pwritev(fd, list(buffers), offset)

    return mock.patch.object(disk_io, "write_all", write_some)


MUTATIONS: dict[str, tuple[Callable[[], Any], str]] = {
    "no-payload-check": (_no_payload_check, "flip"),
    "no-sync": (_no_sync, "lost"),
    "no-dir-sync": (_no_dir_sync, "lost"),
    "early-reuse": (_early_reuse, "kill"),
    "forgotten-deletions": (_forgotten_deletions, "kill"),
    "short-writes": (_short_writes, "short"),
}
"""Each with the kind of case that must find it, within a minute on a machine that does nothing else."""


@contextlib.contextmanager
def mutated(name: str | None) -> Iterator[None]:
    """Run with a defect; None for none."""
    with contextlib.nullcontext() if name is None else MUTATIONS[name][0]():
        yield
