"""Which directories belong together, which one is missing, and what may never be written to."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mii_hcache.errors import ConfigError, StateDirBusyError
from mii_hcache.storage import stripe_set
from mii_hcache.storage.file import FileStore
from mii_hcache.storage.open import OpenedState, open_state
from mii_hcache.storage.open_striped import open_striped
from mii_hcache.storage.state_dir import StateDir
from mii_hcache.storage.stripe_path import StripePath
from mii_hcache.storage.stripe_set import SET_FILE, Member, SetFile, StripeSet, mount_point, read_set_file
from mii_hcache.storage.striped import StripedStore
from tests.storage.storage_kit import IO, PAUSE_S, holds, make_record, put, wait_until

CAPACITY = 1 << 22


@pytest.fixture(autouse=True)
def is_looked_for_soon(monkeypatch) -> None:
    """What is missing, which takes a second else."""
    monkeypatch.setattr("mii_hcache.storage.open.open_striped", partial(open_striped, first_look_s=PAUSE_S))


def open_dirs(*paths: Path) -> OpenedState:
    return open_state(list(paths), CAPACITY, 0, io=IO)


def fill(*paths: Path, num_spans: int = 8) -> list:
    records = [make_record(f"a{idx}", parent=f"a{idx - 1}" if idx else None, span_idx=idx) for idx in range(num_spans)]
    state = open_dirs(*paths)
    assert all(put(state.store, record) for record in records)
    state.close()
    return records


def num_held(state: OpenedState, records: list) -> int:
    return sum(holds(state.store, record) for record in records)


@pytest.fixture
def mounts(monkeypatch, tmp_path) -> Callable[..., None]:
    """Says which folders are mount points; the directory above them is on another device."""

    mounted: set[Path] = set()

    def device_of(path: Path) -> int:
        if not path.exists():
            raise FileNotFoundError(path)
        above = [mount for mount in mounted if mount == path or mount in path.parents]
        return 1000 + max((len(str(mount)) for mount in above), default=0)

    def set_mounted(*paths: Path) -> None:
        mounted.clear()
        mounted.update(path.resolve() for path in paths)

    monkeypatch.setattr(stripe_set, "device_of", device_of)
    return set_mounted


def test_the_order_of_arguments_means_nothing(tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    records = fill(a, b, c)
    for order in ((c, a, b), (b, c, a)):
        state = open_dirs(*order)
        assert state.notes == []
        assert num_held(state, records) == len(records)
        assert state.directories == (a, b, c)
        state.close()
    assert (a / "transcripts.sqlite").exists()
    assert not (c / "transcripts.sqlite").exists()


def test_one_directory_is_as_it_was(tmp_path):
    open_dirs(tmp_path / "a").close()
    assert not (tmp_path / "a" / SET_FILE).exists()


def test_what_held_state_before_stays_first_wherever_it_is_named(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    records = fill(old)
    state = open_dirs(new, old)
    assert state.directories == (old, new)
    assert num_held(state, records) == len(records)
    state.close()


def test_the_same_directory_twice_and_one_inside_another(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for other, words in ((tmp_path / "a", "same"), (tmp_path / "link", "same"), (tmp_path / "a" / "b", "inside")):
        with pytest.raises(ConfigError, match=f"state_dir.*{words}"):
            open_dirs(tmp_path / "a", other)
        with pytest.raises(ConfigError, match=words):
            open_dirs(other, tmp_path / "a")
    assert list((tmp_path / "a").iterdir()) == []


def test_a_directory_of_another_set_is_refused_with_what_to_do(tmp_path):
    a, b, x, y = (tmp_path / name for name in "abxy")
    fill(a, b)
    fill(x, y)
    with pytest.raises(ConfigError, match=f"{x} belongs to another set.*{y}.*delete {x / SET_FILE}"):
        open_dirs(a, x)
    (x / SET_FILE).unlink()
    state = open_dirs(a, b, x)  # as the message says
    assert state.directories == (a, b, x)
    state.close()


def test_a_copy_of_a_member_is_refused(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    fill(a, b)
    shutil.copytree(b, tmp_path / "copy")
    with pytest.raises(ConfigError, match="copy"):
        open_dirs(a, b, tmp_path / "copy")


def test_a_member_that_is_not_given_is_told_of(tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    records = fill(a, b, c)
    for given_dirs in ((a, c), (a,)):
        state = open_dirs(*given_dirs)
        assert any(str(b) in note for note in state.notes)
        assert 0 < num_held(state, records) < len(records)
        state.close()
    state = open_dirs(a, b, c)
    assert state.notes == [] and num_held(state, records) == len(records)
    state.close()


def test_a_moved_directory_is_known_by_what_it_carries(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    records = fill(a, b)
    b.rename(tmp_path / "elsewhere")
    state = open_dirs(tmp_path / "elsewhere", a)
    assert state.notes == [] and num_held(state, records) == len(records)
    state.close()
    members = read_set_file(a).members
    assert [member.path for member in members] == [str(a), str(tmp_path / "elsewhere")]


@pytest.mark.parametrize("below", ["", "state"], ids=["the mount point itself", "a folder on it"])
def test_nothing_is_written_below_a_mount_point_where_nothing_is_mounted(tmp_path, mounts, below):
    a, disk = tmp_path / "a", tmp_path / "disk"
    b = disk / below
    disk.mkdir()
    mounts(disk)
    records = fill(a, b)
    assert read_set_file(a).members[1].mount == str(disk)
    disk.rename(tmp_path / "unplugged")
    disk.mkdir()  # the empty folder that is left of a mount point
    mounts()
    state = open_dirs(a, b)
    assert isinstance(state.store, StripedStore)
    assert any(f"{b} is missing" in note and "mounted" in note for note in state.notes)
    assert 0 < num_held(state, records) < len(records)
    assert all(put(state.store, record) for record in records), "what is missing is saved elsewhere"
    assert num_held(state, records) == len(records)
    assert list(disk.iterdir()) == []
    disk.rmdir()
    (tmp_path / "unplugged").rename(disk)
    mounts(disk)
    path = state.store.paths[1]
    wait_until(lambda: path.store is not None)
    assert num_held(state, records) == len(records)
    state.close()
    state = open_dirs(a, b)
    assert state.notes == []
    state.close()


def test_an_emptied_disk_that_is_mounted_is_taken_as_new(tmp_path, mounts):
    a, disk = tmp_path / "a", tmp_path / "disk"
    disk.mkdir()
    mounts(disk)
    records = fill(a, disk)
    shutil.rmtree(disk)
    disk.mkdir()
    state = open_dirs(a, disk)
    assert state.notes == [] and 0 < num_held(state, records) < len(records)
    assert read_set_file(disk).ordinal == 1
    state.close()


def test_the_first_directory_may_be_missing_too(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    records = fill(a, b)
    a.rename(tmp_path / "hidden")
    a.write_text("no directory")
    state = open_dirs(a, b)
    assert state.directories == (b,)
    assert any("transcripts" in note for note in state.notes)
    assert 0 < num_held(state, records) < len(records)
    a.unlink()
    (tmp_path / "hidden").rename(a)
    assert isinstance(state.store, StripedStore)
    path = state.store.paths[0]
    wait_until(lambda: path.store is not None)
    assert num_held(state, records) == len(records)
    state.close()


def hanging(path: Path, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A directory does not answer until the event is set."""
    answers = threading.Event()

    def hangs(directory: Path) -> SetFile | None:
        assert directory != path or answers.wait(60)
        return read_set_file(directory)

    monkeypatch.setattr(stripe_set, "LOOK_S", 0.1)
    monkeypatch.setattr(stripe_set, "read_set_file", hangs)
    return answers


def test_a_directory_that_hangs_at_the_start_is_waited_for_in_the_background(tmp_path, monkeypatch):
    a, b = tmp_path / "a", tmp_path / "b"
    records = fill(a, b)
    answers = hanging(b, monkeypatch)
    store = open_striped(StripeSet.of([b, a]), CAPACITY, io=IO, opening_s=0.2, first_look_s=0.01)
    assert [path.why_missing is None for path in store.paths] == [True, False]
    assert any(f"{b} is missing" in note for note in store.notes)
    assert 0 < sum(holds(store, record) for record in records) < len(records)
    answers.set()
    wait_until(lambda: store.paths[1].store is not None)
    assert all(holds(store, record) for record in records)
    store.close()


def test_a_directory_that_opens_while_the_store_is_being_made_is_told_of_pins(tmp_path, monkeypatch):
    """Too late to be asked, too early to be told by who looked for it."""
    a, b = tmp_path / "a", tmp_path / "b"
    records = fill(a, b)
    answers = hanging(b, monkeypatch)

    class MadeMeanwhile(StripedStore):
        def __init__(self, paths: Sequence[StripePath]) -> None:
            super().__init__(paths)
            answers.set()
            wait_until(lambda: not any(thread.name == "hcache-look" for thread in threading.enumerate()))

    monkeypatch.setattr("mii_hcache.storage.open_striped.StripedStore", MadeMeanwhile)
    store = open_striped(StripeSet.of([b, a]), CAPACITY, io=IO, opening_s=0.2, first_look_s=0.01)
    assert len(store.stores) == 2
    store.pin([record.span_id for record in records])
    assert [len(one._index._order._pins) for one in store.stores] == [len(records)] * 2
    store.close()


def test_closing_waits_for_a_directory_that_is_being_opened(tmp_path):
    """Or the next one to open it finds it in use."""
    begun, goes_on = threading.Event(), threading.Event()
    opened: list[FileStore] = []

    def open_path() -> tuple[StateDir, FileStore]:
        begun.set()
        assert goes_on.wait(60)
        state_dir = StateDir(tmp_path / "a")
        opened.append(FileStore(state_dir, CAPACITY, io=IO))
        return state_dir, opened[0]

    path = StripePath(tmp_path / "a", open_path)
    assert begun.wait(60)
    threading.Timer(0.1, goes_on.set).start()
    path.close()
    assert path.store is None and opened[0].has_ended
    StateDir(tmp_path / "a").close()


def test_deleted_while_its_disk_was_missing_is_deleted_when_it_is_back(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    records = fill(a, b)
    b.rename(tmp_path / "hidden")
    b.write_text("no directory")
    state = open_dirs(a, b)
    state.store.delete([record.span_id for record in records])
    b.unlink()
    (tmp_path / "hidden").rename(b)
    assert isinstance(state.store, StripedStore)
    path = state.store.paths[1]
    wait_until(lambda: path.store is not None)
    assert num_held(state, records) == 0
    state.close()
    state = open_dirs(a, b)
    assert num_held(state, records) == 0
    state.close()


def test_a_new_directory_that_cannot_be_made_is_a_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="state_dir"):
        open_dirs(tmp_path / "a", tmp_path / "file")
    with pytest.raises(ConfigError, match="state_dir"):
        open_dirs(tmp_path / "a", tmp_path / "file" / "b")
    open_dirs(tmp_path / "a").close()  # nothing stayed locked


def test_a_directory_that_another_server_has_is_refused(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    fill(a, b)
    state = open_dirs(b)
    with pytest.raises(StateDirBusyError):
        open_dirs(a, b)
    state.close()
    open_dirs(a, b).close()


def test_a_damaged_set_file_is_told_of_and_mended(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    records = fill(a, b)
    (b / SET_FILE).write_bytes(b"{")
    state = open_dirs(b, a)
    assert any(SET_FILE in note for note in state.notes)
    assert state.directories == (a, b)
    assert num_held(state, records) == len(records)
    state.close()
    assert read_set_file(b).ordinal == 1


@settings(max_examples=50)
@given(st.binary(max_size=300) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
def test_hostile_set_files_are_refused(raw):
    with pytest.raises(ValueError):
        SetFile.parse(raw if isinstance(raw, bytes) else raw.encode())


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"ordinal": -1},
        {"ordinal": True},
        {"ordinal": 7},
        {"generation": "1"},
        {"set_id": ""},
        {"members": None},
        {"members": [{"ordinal": 0, "path": "/a"}]},
        {"members": [{"ordinal": 0, "path": "/a", "mount": "/"}] * 2},
    ],
)
def test_set_files_that_contradict_themselves_are_refused(change):
    good = SetFile(set_id="s", ordinal=0, generation=1, members=(Member(ordinal=0, path="/a", mount="/"),))
    assert SetFile.parse(good.pack()) == good
    with pytest.raises(ValueError):
        SetFile.parse(json.dumps(json.loads(good.pack()) | change).encode())


def test_mount_points_are_found_above_what_does_not_exist_yet(tmp_path, mounts):
    mounts(tmp_path / "disk")
    (tmp_path / "disk").mkdir()
    assert mount_point(tmp_path / "disk" / "not" / "yet") == tmp_path / "disk"
    assert mount_point(tmp_path / "other") == Path("/")


def test_a_set_remembers_members_through_generations(tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    fill(a, b)
    fill(a, b, c)
    before = (a / SET_FILE).read_bytes()
    fill(c, b, a)
    assert (a / SET_FILE).read_bytes() == before, "nothing changed, nothing was written"
    stripes = StripeSet.of([c])
    assert stripes.is_striped and len(stripes.notes) == 2
