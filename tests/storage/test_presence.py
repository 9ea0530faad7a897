"""Disks that fail, hang and come back: nothing is forgotten, nothing waits for ever, nothing wrong is served."""

from __future__ import annotations

import errno
import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from mii_hcache.errors import StateDirBusyError
from mii_hcache.storage.file import FileStore
from mii_hcache.storage.memory import MemoryStore
from mii_hcache.storage.native import why_no_uring
from mii_hcache.storage.open_striped import open_striped
from mii_hcache.storage.presence import Presence
from mii_hcache.storage.records import ReadOutcome, SpanRecord
from mii_hcache.storage.state_dir import StateDir
from mii_hcache.storage.stripe_set import StripeSet
from mii_hcache.storage.striped import StripedStore
from mii_hcache.storage.tiered import TieredStore
from mii_hcache.storage.workers import StalledError, Workers
from tests.storage.faults import HANG_S, DeadDisk
from tests.storage.storage_kit import (
    PAUSE_S,
    SPAN_BYTES,
    SPAN_DISK_BYTES,
    holds,
    make_record,
    put,
    reads_of,
    wait_until,
    wait_until_here,
)

PATIENCE_S = 60.0
"""Deadline of a disk that answers, however busy the machine is; one that hangs has a short one (`DeadDisk.hang`)."""
SOON_S = 30.0
"""A bound on what may take a few short deadlines, on a busy machine, and never the time for which a disk hangs here."""


@pytest.fixture(params=["uring", "threads"])
def io_name(request) -> str:
    why_not = why_no_uring() if request.param == "uring" else None
    if why_not is not None:
        pytest.skip(why_not)
    return request.param


@pytest.fixture
def striped(tmp_path, io_name) -> Iterator[StripedStore]:
    stripes = StripeSet.of([tmp_path / name for name in "ab"])
    capacity_bytes = 200 * SPAN_DISK_BYTES
    store = open_striped(stripes, capacity_bytes, io=io_name, deadline_s=PATIENCE_S, first_look_s=PAUSE_S)
    yield store
    store.close()


@pytest.fixture
def single(tmp_path, io_name) -> Iterator[FileStore]:
    state_dir = StateDir(tmp_path / "state")
    store = FileStore(state_dir, 1 << 24, io=io_name, deadline_s=PATIENCE_S, first_pause_s=PAUSE_S)
    yield store
    store.close()
    state_dir.close()


@pytest.fixture
def disk(single, monkeypatch) -> Iterator[DeadDisk]:
    disk = DeadDisk(monkeypatch, single)
    yield disk
    disk.answer()


@pytest.fixture
def one_of_two(striped, monkeypatch) -> Iterator[DeadDisk]:
    disk = DeadDisk(monkeypatch, striped.stores[1])
    yield disk
    disk.answer()


def chain(num_spans: int) -> list[SpanRecord]:
    return [
        make_record(f"a{idx}", parent=f"a{idx - 1}" if idx else None, root="a0", span_idx=idx)
        for idx in range(num_spans)
    ]


def filled(store, num_spans: int = 8) -> list[SpanRecord]:
    records = chain(num_spans)
    assert all(put(store, record) for record in records)
    store.flush()
    return records


@pytest.mark.parametrize("code", [errno.EIO, errno.ENODEV, errno.ESTALE])
def test_a_disk_that_fails_forgets_nothing_and_comes_back(single, disk, code):
    records = filled(single)
    disk.error = code
    assert single.get_into(reads_of(records[2])) == ReadOutcome(num_ok=0, reason="unavailable")
    assert single.find(records[2].span_id) is None and single.find(records[3].span_id) is None
    assert single.why_missing(records[3].span_id) == "unavailable"
    assert single.get_into(reads_of(records[3])) == ReadOutcome(num_ok=0, reason="unavailable")
    assert not put(single, make_record("new"))
    stats = single.stats()
    assert (stats.num_spans, stats.corrupt_chunks, stats.num_away, stats.dropped_spans) == (8, 0, 1, 1)
    assert stats.unavailable == 3
    time.sleep(10 * PAUSE_S)
    assert not single.presence.is_here, "probes see that it still fails"
    disk.error = 0
    wait_until_here(single)
    assert all(holds(single, record) for record in records)
    assert single.stats().corrupt_chunks == 0
    assert put(single, make_record("new"))


def test_deletions_are_not_lost_while_a_disk_is_away(single, disk, tmp_path):
    records = filled(single)
    disk.error = errno.EIO
    single.get_into(reads_of(records[0]))
    assert single.delete([records[1].span_id]) == 1
    disk.error = 0
    wait_until_here(single)
    assert single.find(records[1].span_id) is None


def test_one_bad_chunk_costs_its_span_and_no_more(single, disk):
    records = filled(single)
    place = single._index._spans[records[5].span_id].places[1]
    disk.bad_offsets = {single._segments._files[place.segment]._offset(place.slot)}
    reads = reads_of(records[5])
    assert single.get_into(reads) == ReadOutcome(num_ok=1, reason="unavailable")
    wait_until_here(single)
    assert single.why_missing(records[5].span_id) == "corrupt"
    assert [holds(single, record) for record in records] == [idx != 5 for idx in range(8)]
    assert (single.stats().corrupt_chunks, single.stats().num_away) == (1, 0)


def test_probes_come_ever_more_rarely_and_a_flapping_disk_waits_longer():
    probes: list[float] = []

    def probe() -> None:
        probes.append(time.monotonic())
        if len(probes) < 5:
            raise OSError(errno.EIO, "still")

    presence = Presence("a disk", probe, first_pause_s=0.02)
    presence.failed(OSError(errno.EIO, "gone"))
    presence.failed(OSError(errno.EIO, "gone"))
    assert not presence.is_here
    wait_until(lambda: presence.is_here)
    pauses = [late - early for early, late in itertools.pairwise(probes)]
    assert len(probes) == 5 and all(pause >= 0.02 * 2 ** (idx + 1) for idx, pause in enumerate(pauses))
    again_s = time.monotonic()
    presence.failed(OSError(errno.EIO, "again"))
    wait_until(lambda: presence.is_here)
    assert time.monotonic() - again_s >= 0.02 * 2**5
    presence.close()


def test_a_probe_that_trips_over_the_end_is_not_told_of(caplog):
    is_probed, is_closed = threading.Event(), threading.Event()

    def probe() -> None:
        is_probed.set()
        assert is_closed.wait(60)
        raise RuntimeError("closed")

    presence = Presence("a disk", probe, first_pause_s=0.01)
    presence.failed(OSError(errno.EIO, "gone"))
    assert is_probed.wait(60)
    presence.close()
    is_closed.set()
    wait_until(lambda: not any(thread.name == "hcache-probe" for thread in threading.enumerate()))
    assert "is away" in caplog.text and not any(record.exc_info for record in caplog.records)


def test_a_disk_hangs_when_an_operation_takes_longer_than_the_deadline(monkeypatch):
    now_s, stalls = [100.0], []
    monkeypatch.setattr("mii_hcache.storage.presence.time", SimpleNamespace(monotonic=lambda: now_s[0]))
    presence = Presence("a disk", lambda: None, deadline_s=10.0, on_stall=lambda: stalls.append(now_s[0]))
    with presence.operation():
        now_s[0] = 105.0
        with presence.operation():
            now_s[0] = 110.0
            assert presence.is_here and not presence.is_stuck, "not yet"
            now_s[0] = 110.5
            assert presence.is_stuck and not presence.is_here
    assert not presence.is_stuck and stalls
    presence.close()


@pytest.mark.parametrize("may_be_cancelled", [True, False])
def test_a_disk_that_hangs_is_away_until_it_answers(single, disk, io_name, may_be_cancelled):
    records = filled(single)
    disk.may_be_cancelled = may_be_cancelled
    disk.hang()
    outcomes: list[ReadOutcome] = []
    reader = threading.Thread(target=lambda: outcomes.append(single.get_into(reads_of(records[0]))), daemon=True)
    reader.start()
    wait_until(lambda: single.find(records[0].span_id) is None)
    assert single.get_into(reads_of(records[1])) == ReadOutcome(num_ok=0, reason="unavailable")
    assert not put(single, make_record("new"))
    started_s = time.monotonic()
    single.flush()
    assert time.monotonic() - started_s < SOON_S
    if may_be_cancelled and io_name == "uring":
        reader.join(SOON_S)
        assert outcomes == [ReadOutcome(num_ok=0, reason="unavailable")], "called back"
    else:
        assert outcomes == []
    disk.answer()
    reader.join(SOON_S)
    assert len(outcomes) == 1
    wait_until_here(single)
    assert all(holds(single, record) for record in records)
    assert single.stats().corrupt_chunks == 0


def test_a_put_that_hangs_returns_and_its_bytes_are_never_served(single, disk):
    records = filled(single)
    disk.hang()
    started_s = time.monotonic()
    assert not put(single, make_record("new"))
    assert time.monotonic() - started_s < SOON_S
    assert single.stats().dropped_spans == 1 and single.stats().num_away == 1
    disk.answer()
    wait_until_here(single)
    assert not holds(single, make_record("new")), "its memory may have been others' meanwhile"
    assert put(single, make_record("new"), writer=1)
    assert holds(single, make_record("new"), writer=1)
    assert all(holds(single, record) for record in records)


def test_close_returns_and_keeps_the_directory_locked_while_its_disk_hangs(tmp_path, io_name, monkeypatch):
    stripes = StripeSet.of([tmp_path / name for name in "ab"])
    store = open_striped(stripes, 1 << 24, io=io_name, deadline_s=PATIENCE_S, first_look_s=PAUSE_S)
    records = filled(store)
    stores = store.stores
    disk = DeadDisk(monkeypatch, stores[1])
    disk.hang()
    reader = threading.Thread(target=lambda: stores[1].get_into(reads_of(_there(stores[1], records))), daemon=True)
    reader.start()
    wait_until(lambda: stores[1].presence.is_stuck)
    started_s = time.monotonic()
    store.close()
    store.close()
    assert time.monotonic() - started_s < SOON_S
    StateDir(tmp_path / "a").close()
    with pytest.raises(StateDirBusyError):
        StateDir(tmp_path / "b")
    disk.answer()
    reader.join(SOON_S)
    wait_until(lambda: stores[1].has_ended)


def _there(store: FileStore, records: list[SpanRecord]) -> SpanRecord:
    return next(record for record in records if store.find(record.span_id) is not None)


def test_puts_go_to_the_other_path_at_once_and_reads_are_cut(striped, one_of_two):
    records = filled(striped)
    lost = [striped.stores[1].knows(record.span_id) for record in records]
    assert sum(lost) == 4
    one_of_two.error = errno.EIO
    outcome = striped.get_into([reads_of(record)[0] for record in records])
    assert outcome == ReadOutcome(num_ok=lost.index(True), reason="unavailable")
    assert [holds(striped, record) for record in records] == [not one for one in lost]
    again = [record for record, one in zip(records, lost, strict=True) if one]
    assert all(put(striped, record, writer=1) for record in again), "saved anew on the other path"
    assert all(holds(striped, record, writer=1) for record in again)
    assert striped.stats().dropped_spans == 0 and striped.stats().num_away == 1
    one_of_two.error = 0
    wait_until_here(striped.stores[1])
    for record in records:
        assert striped.get_into(reads_of(record)).reason is None
    assert striped.stats().num_away == 0
    assert striped.delete([record.span_id for record in records]) == 8
    assert not any(striped.find(record.span_id) for record in records), "both copies"


def test_a_put_that_hangs_on_one_path_is_taken_by_the_other(striped, one_of_two):
    one_of_two.hang()
    started_s = time.monotonic()
    records = chain(30)
    assert all(put(striped, record) for record in records)
    assert time.monotonic() - started_s < SOON_S
    assert all(holds(striped, record) for record in records)
    assert striped.stores[1].stats().num_spans == 0
    assert striped.stats().dropped_spans == 0


def test_behind_dram_the_writers_go_on(striped, one_of_two):
    store = TieredStore(MemoryStore(6 * SPAN_BYTES), striped, put_wait_s=PATIENCE_S, deadline_s=HANG_S)
    one_of_two.hang()
    records = chain(24)
    assert all(put(store, record) for record in records)
    started_s = time.monotonic()
    store.flush()
    assert time.monotonic() - started_s < SOON_S
    assert all(holds(store, record) for record in records)
    assert store.stats().num_away == 1
    store.close()
    one_of_two.answer()


def test_a_promotion_that_hangs_holds_up_no_writer(striped, one_of_two):
    store = TieredStore(MemoryStore(4 * SPAN_BYTES), striped, put_wait_s=PATIENCE_S, deadline_s=HANG_S)
    records = filled(store, 12)
    one_of_two.hang()
    for record in records:  # as after a read of the last chunk
        store._promote_later(reads_of(record))
    others = [make_record(idx) for idx in range(12)]
    assert all(put(store, record) for record in others)
    started_s = time.monotonic()
    store.flush()
    store.close()
    assert time.monotonic() - started_s < SOON_S
    one_of_two.answer()


def test_workers_do_without_threads_that_hang():
    workers = Workers(2, "test")
    release = threading.Event()
    for _ in range(5):
        with pytest.raises(StalledError):
            workers.call(lambda: release.wait(60), 0.02)
    assert workers.call(lambda: 3, 60.0) == 3
    with pytest.raises(ZeroDivisionError):
        workers.call(lambda: 1 // 0, 60.0)
    with pytest.raises(TimeoutError, match="its own"):
        workers.call(_times_out, 60.0)
    stuck = workers.submit(lambda: release.wait(60))
    wait_until(stuck.running)
    assert not workers.close(0.02)
    release.set()
    assert stuck.result(60) and workers.close(60)
    with pytest.raises(RuntimeError):
        workers.submit(lambda: 1)


def _times_out() -> None:
    raise TimeoutError(errno.ETIMEDOUT, "its own")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_path_without_room_hands_its_puts_on_and_is_used_again(striped, one_of_two, code):
    one_of_two.write_error = code
    records = chain(12)
    assert all(put(striped, record) for record in records)
    assert striped.stores[1].stats().num_spans == 0
    assert (striped.stats().dropped_spans, striped.stats().num_away) == (0, 0), "it answers"
    one_of_two.write_error = 0
    striped.stores[1]._room._full_until_s = 0.0  # as after a few seconds
    more = [make_record(idx) for idx in range(20)]
    assert all(put(striped, record) for record in more)
    assert striped.stores[1].stats().num_spans > 0
    assert all(holds(striped, record) for record in [*records, *more])


@pytest.mark.parametrize("num_hanging", [1, 2])
def test_a_process_ends_although_disks_hang(tmp_path, num_hanging):
    """Threads in system calls that do not return are left behind, by `close` and by the interpreter."""
    script = f"""
import os, threading, time
from mii_hcache.storage.open import open_state
from tests.storage.storage_kit import make_record, put, reads_of
folder = {str(tmp_path)!r}
state = open_state([folder + "/a", folder + "/b"], 1 << 24, 1 << 20, io="threads", deadline_s=0.2)
assert all(put(state.store, make_record(idx)) for idx in range(8))
state.store.flush()
real = os.preadv, os.pwritev
names = tuple(folder + "/" + name for name in "ab"[:{num_hanging}])
def hang(fd):
    if os.readlink(f"/proc/self/fd/{{fd}}").startswith(names):
        time.sleep(600)
os.preadv = lambda fd, *rest: (hang(fd), real[0](fd, *rest))[1]
os.pwritev = lambda fd, *rest: (hang(fd), real[1](fd, *rest))[1]
for idx in range(8):
    threading.Thread(target=state.store._file.get_into, args=(reads_of(make_record(idx)),), daemon=True).start()
for idx in range(8, 16):
    put(state.store, make_record(idx))
state.close()
print("closed")
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == "closed"
