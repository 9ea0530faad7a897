"""The file store against a dict, over any sequence of calls, crashes and restarts."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mii_hcache.core.geometry import ChunkKind
from mii_hcache.core.layout import SpanLayout
from mii_hcache.storage.file import FileStore
from mii_hcache.storage.open_striped import open_striped
from mii_hcache.storage.state_dir import StateDir
from mii_hcache.storage.stripe_set import StripeSet
from tests.storage.storage_kit import IO, disk_bytes, holds, make_chunks, make_record, put, read_span, reads_of

NAMES = range(6)
LAYOUTS = (
    SpanLayout.shared((None, ChunkKind.HIDDEN, ChunkKind.HIDDEN), 900, 5000),
    SpanLayout.shared((ChunkKind.KV, ChunkKind.KV, None), 900, 5000),
    SpanLayout.shared((None, ChunkKind.HIDDEN, ChunkKind.KV), 900, 5000),
)
"""Two chunks each, in slots of one size, of another, and of both."""
names = st.sampled_from(NAMES)


class FileStoreMachine(RuleBasedStateMachine):
    """The model: who wrote each span that is there, in which layout; and what is surely durable."""

    num_paths = 1

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.num_dirs = 0
        self.num_writers = 0
        self.there: dict[int, tuple[int, int]] = {}
        self.durable: dict[int, tuple[int, int]] = {}
        self.perhaps: dict[int, list[tuple[int, int] | None]] = {}
        """What a crash may leave, for names that changed since the last flush."""
        self.pinned: dict[int, int] = {}

    @initialize(is_small=st.booleans())
    def start(self, is_small):
        self.is_small = is_small
        self.capacity_bytes = self.num_paths * (90_000 if is_small else 1 << 20)
        self.open(self.root / "state0")

    def open(self, path: Path) -> None:
        self.path = path
        self.state_dir = StateDir(path)
        self.store = FileStore(self.state_dir, self.capacity_bytes, flush_interval_s=None, segment_bytes=50_000, io=IO)

    def close(self) -> None:
        self.store.close()
        self.state_dir.close()

    @property
    def occupied_bytes(self) -> int:
        """What the store says that it takes on disk."""
        return self.store.disk_bytes

    def record(self, name: int, layout_idx: int = 0):
        parent = name - 1 if name else None
        return make_record(name, layout=LAYOUTS[layout_idx], parent=parent, span_idx=name)

    def changed(self, name: int) -> None:
        self.perhaps.setdefault(name, [self.durable.get(name)]).append(self.there.get(name))

    def notice_evictions(self) -> None:
        """In a small store spans may go whenever one is put, but not pinned ones."""
        for name in list(self.there):
            if self.store.find(self.record(name).span_id) is None:
                assert self.is_small
                assert not self.pinned.get(name)
                assert self.store.why_missing(self.record(name).span_id) == "evicted"
                del self.there[name]
                self.changed(name)

    @rule(name=names, layout_idx=st.sampled_from(range(len(LAYOUTS))))
    def put(self, name, layout_idx):
        self.num_writers += 1
        was = self.there.get(name)
        accepted = put(self.store, self.record(name, layout_idx), writer=self.num_writers)
        self.notice_evictions()
        if was is not None:
            assert accepted
            assert self.there[name] == was, "the first writer wins, and is not evicted for it"
        elif accepted:
            self.there[name] = (layout_idx, self.num_writers)
            self.changed(name)
        else:
            assert self.is_small
            assert self.pinned

    @rule(name=names)
    def delete(self, name):
        num_deleted = self.store.delete([self.record(name).span_id])
        assert num_deleted == (name in self.there)
        if num_deleted:
            del self.there[name]
            self.changed(name)

    @rule(batch=st.lists(names, min_size=1, max_size=8), chunk_idx=st.integers(0, 1))
    def read_batch(self, batch, chunk_idx):
        records = [self.record(name, self.there.get(name, (0, 0))[0]) for name in batch]
        reads = [reads_of(record)[chunk_idx] for record in records]
        outcome = self.store.get_into(reads)
        num_there = next((idx for idx, name in enumerate(batch) if name not in self.there), len(batch))
        assert outcome.num_ok == num_there
        assert outcome.reason == (None if num_there == len(batch) else "missing")

    @rule(batch=st.lists(names, max_size=3))
    def touch(self, batch):
        self.store.touch([self.record(name).span_id for name in batch])

    @rule(name=names)
    def pin(self, name):
        self.store.pin([self.record(name).span_id])
        if name in self.there:
            self.pinned[name] = self.pinned.get(name, 0) + 1

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data):
        name = data.draw(st.sampled_from(sorted(self.pinned)))
        self.store.unpin([self.record(name).span_id])
        self.pinned[name] -= 1
        if not self.pinned[name]:
            del self.pinned[name]

    @rule()
    def flush(self):
        self.store.flush()
        self.durable = dict(self.there)
        self.perhaps = {}

    @rule()
    def restart(self):
        self.close()
        self.pinned = {}
        self.open(self.path)
        self.durable = dict(self.there)
        self.perhaps = {}

    @rule()
    def crash(self):
        self.num_dirs += 1
        copy = self.root / f"state{self.num_dirs}"
        shutil.copytree(self.path, copy)
        self.close()
        shutil.rmtree(self.path)
        self.pinned = {}
        self.open(copy)
        there = {}
        for name in NAMES:
            record = self.store.find(self.record(name).span_id)
            may_be = self.perhaps.get(name, [self.durable.get(name)])
            if record is None:
                assert None in may_be, (name, may_be)
                continue
            chunks, reason = read_span(self.store, record)
            assert reason is None
            left = {was for was in may_be if was and chunks == make_chunks(self.record(name, was[0]), was[1])}
            assert len(left) == 1, (name, may_be)
            there[name] = left.pop()
        self.there, self.durable, self.perhaps = there, dict(there), {}

    @invariant()
    def what_is_there_reads_back(self):
        if not hasattr(self, "store"):
            return
        for name in NAMES:
            layout_idx, writer = self.there.get(name, (0, 0))
            record = self.record(name, layout_idx)
            assert self.store.find(record.span_id) == (record if name in self.there else None)
            assert holds(self.store, record, writer) == (name in self.there)
        stats = self.store.stats()
        assert stats.num_spans == len(self.there)
        assert stats.num_bytes == sum(LAYOUTS[layout_idx].num_bytes for layout_idx, _ in self.there.values())
        assert stats.corrupt_chunks == 0
        assert disk_bytes(self.path) <= self.occupied_bytes <= self.capacity_bytes

    def teardown(self):
        if hasattr(self, "store"):
            self.close()
        shutil.rmtree(self.root)


class StripedStoreMachine(FileStoreMachine):
    """The same over several paths. Each evicts by itself, so what is pinned on one does not make another refuse."""

    num_paths = 2

    def open(self, path: Path) -> None:
        self.path = path
        folders = [path / f"path{idx}" for idx in range(self.num_paths)]
        if self.num_dirs % 2:
            folders.reverse()  # the order of arguments means nothing
        self.store = open_striped(
            StripeSet.of(folders), self.capacity_bytes, flush_interval_s=None, segment_bytes=50_000, io=IO
        )

    def close(self) -> None:
        self.store.close()

    @property
    def occupied_bytes(self) -> int:
        return sum(store.disk_bytes for store in self.store.stores)


class ThreePathsMachine(StripedStoreMachine):
    """A third one."""

    num_paths = 3


TestFileStore = FileStoreMachine.TestCase
TestFileStore.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestTwoPaths = StripedStoreMachine.TestCase
TestTwoPaths.settings = settings(max_examples=10, stateful_step_count=25, deadline=None)
TestThreePaths = ThreePathsMachine.TestCase
TestThreePaths.settings = settings(max_examples=6, stateful_step_count=25, deadline=None)
