"""Reading every saved byte and comparing it with what was written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from crc32c import crc32c

from mii_hcache.core.identity import SpanId
from mii_hcache.errors import CorruptChunkError
from mii_hcache.storage.catalog import SpanRow
from mii_hcache.storage.format import SlotHeader
from mii_hcache.storage.segment import SegmentFile
from mii_hcache.storage.slots import Place
from mii_hcache.storage.state_dir import owner_of
from mii_hcache.tools.state_view import StateView, read_rows


@dataclass(frozen=True, kw_only=True)
class Damage:
    """A chunk that is not what was written."""

    span_id: SpanId
    generation: int
    layer_idx: int
    place: Place
    reason: str
    is_unread: bool = False
    """The disk did not give the bytes, which may be sound: whatever ails it may pass."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What reading everything found."""

    num_chunks: int
    num_bytes: int
    damages: list[Damage]


def verify(view: StateView, count: Callable[[int, int], None]) -> Verification:
    """Read every chunk of the view: its header must be the one that the catalog implies, its CRC32C the catalog's.

    A running server is not in the way: no slot that a committed row names is ever written, so what does not fit is
    damaged if its row is still there afterwards, and was deleted meanwhile if not. `count(done, all)` is called often.
    """
    found = compare(view, view.rows, count)
    return replace(found, damages=_confirmed(view, found.damages))


def compare(view: StateView, rows: Sequence[SpanRow], count: Callable[[int, int], None]) -> Verification:
    """`verify` of rows that nobody changes meanwhile, be they in the catalog or not."""
    places = sorted(
        ((place, row, chunk_idx) for row in rows for chunk_idx, place in enumerate(row.places)),
        key=lambda item: item[0],
    )
    suspects: list[Damage] = []
    num_bytes = 0
    with _Files(view) as files:
        for done, (place, row, chunk_idx) in enumerate(places, start=1):
            reason, is_unread = files.check(place, row, chunk_idx)
            chunk = row.record.layout.chunks[chunk_idx]
            num_bytes += chunk.num_bytes
            if reason is not None:
                suspects.append(
                    Damage(
                        span_id=row.record.span_id,
                        generation=row.generation,
                        layer_idx=chunk.layer_idx,
                        place=place,
                        reason=reason,
                        is_unread=is_unread,
                    )
                )
            count(done, len(places))
    return Verification(num_chunks=len(places), num_bytes=num_bytes, damages=suspects)


def _confirmed(view: StateView, suspects: list[Damage]) -> list[Damage]:
    if not suspects:
        return []
    later = replace(view, owner=owner_of(view.path), problems=[])
    still = {(row.record.span_id, row.generation) for row in read_rows(later)}
    return [damage for damage in suspects if (damage.span_id, damage.generation) in still]


class _Files:
    """Segment files, opened when they are first read. A context manager; one thread."""

    def __init__(self, view: StateView) -> None:
        assert view.store_uuid is not None or not view.rows
        self._store_uuid = view.store_uuid or b""
        self._directory = view.path / "segments"
        self._open: dict[int, SegmentFile] = {}
        self._stack = ExitStack()
        self._out = memoryview(b"")

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def check(self, place: Place, row: SpanRow, chunk_idx: int) -> tuple[str | None, bool]:
        """What is wrong with a chunk, None when nothing is; and whether it is only that it could not be read."""
        chunk = row.record.layout.chunks[chunk_idx]
        header = SlotHeader.of(
            row.record.layout,
            chunk_idx,
            store_uuid=self._store_uuid,
            span_id=row.record.span_id,
            generation=row.generation,
            crc=row.crcs[chunk_idx],
        )
        if len(self._out) != chunk.num_bytes:
            self._out = memoryview(bytearray(chunk.num_bytes))
        try:
            self._file(place.segment).read_into(place.slot, header, self._out)
        except CorruptChunkError as error:
            return str(error), False
        except OSError as error:
            return str(error), not isinstance(error, FileNotFoundError)
        return (None if crc32c(self._out) == header.crc else "wrong checksum"), False

    def _file(self, number: int) -> SegmentFile:
        if number not in self._open:
            self._open[number] = SegmentFile.open_to_read(self._directory / f"{number:08d}.seg")
            self._stack.callback(self._open[number].close)
        return self._open[number]
