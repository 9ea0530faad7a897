"""The state directory is private and has one owner."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import pytest

from mii_hcache.errors import ConfigError, StateDirBusyError
from mii_hcache.storage.open import open_state
from mii_hcache.storage.state_dir import StateDir, new_store_uuid
from tests.storage.storage_kit import SPAN_BYTES, make_record, put

OWNER = """
import sys, time
from mii_hcache.storage.state_dir import StateDir
state_dir = StateDir(sys.argv[1])
print("ready", flush=True)
time.sleep(60)
"""


def modes(root) -> dict[str, int]:
    paths = [root, *root.rglob("*")]
    return {str(path.relative_to(root)): stat.S_IMODE(path.lstat().st_mode) for path in paths}


@pytest.mark.parametrize("umask", [0, 0o022, 0o277])
def test_everything_is_private_whatever_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        state = open_state(tmp_path / "state", 1 << 20, 4 * SPAN_BYTES)
        put(state.store, make_record("a"))
        state.transcripts.remember(b"", "text", [1, 2])
        state.store.flush()
        state.transcripts.flush()
        found = modes(tmp_path / "state")
        state.close()
    finally:
        os.umask(before)
    assert {name for name in found if name.endswith((".seg", "-wal"))} == {
        "segments/00000001.seg",
        "catalog.sqlite-wal",
        "transcripts.sqlite-wal",
        "pins.sqlite-wal",
    }
    for name, mode in found.items():
        assert mode == (0o700 if name in (".", "segments") else 0o600), name


def test_what_was_wider_is_tightened_and_foreign_files_are_left_alone(tmp_path):
    path = tmp_path / "state"
    state = open_state(path, 1 << 20, 0)
    put(state.store, make_record("a"))
    state.close()
    (path / "notes.txt").write_text("mine")
    outside = tmp_path / "outside"
    outside.write_text("not ours")
    (path / "segments" / "00000009.seg").symlink_to(outside)
    for file in (outside, *path.rglob("*")):
        file.chmod(0o777 if file.is_dir() else 0o644)
    path.chmod(0o755)
    StateDir(path).close()
    found = modes(path)
    assert found.pop("notes.txt") == 0o644
    assert found.pop("segments/00000009.seg") == 0o777  # the link itself has no mode of its own
    assert stat.S_IMODE(outside.stat().st_mode) == 0o644
    assert {mode for name, mode in found.items() if name not in (".", "segments")} == {0o600}
    assert found["."] == found["segments"] == 0o700


def test_a_second_owner_is_told_who_the_first_is(tmp_path):
    with subprocess.Popen([sys.executable, "-c", OWNER, tmp_path], stdout=subprocess.PIPE) as owner:
        try:
            assert owner.stdout.readline() == b"ready\n"
            with pytest.raises(StateDirBusyError) as busy:
                StateDir(tmp_path)
            assert f"process {owner.pid}" in str(busy.value)
            assert str(tmp_path) in str(busy.value)
            assert "stop that server" in str(busy.value)
        finally:
            owner.kill()
    StateDir(tmp_path).close()  # death released it


def test_one_process_cannot_own_it_twice_but_again_after_close(tmp_path):
    first = StateDir(tmp_path)
    with pytest.raises(StateDirBusyError, match=f"process {os.getpid()}"):
        StateDir(tmp_path)
    first.close()
    first.close()
    StateDir(tmp_path).close()


FORKED = """
import os, sys
from mii_hcache.storage.state_dir import StateDir
state_dir = StateDir(sys.argv[1])
if os.fork() == 0:
    print("child runs", flush=True)
    os.read(0, 1)
else:
    os.read(0, 1)  # killed here
"""


def test_a_forked_child_neither_keeps_nor_loses_its_parents_directory(tmp_path):
    command = [sys.executable, "-c", FORKED, tmp_path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout.readline() == b"child runs\n"
        with pytest.raises(StateDirBusyError):
            StateDir(tmp_path)
        owner.kill()
        owner.wait()
        StateDir(tmp_path).close()  # though the child lives


def test_a_directory_that_cannot_be_used_is_a_configuration_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"state_dir .* choose a directory you own"):
        StateDir(tmp_path / "file")
    with pytest.raises(ConfigError):
        StateDir(tmp_path / "file" / "below")


def test_the_stores_identity_stays(tmp_path):
    state_dir = StateDir(tmp_path)
    assert state_dir.read_store_uuid() is None
    store_uuid = new_store_uuid()
    state_dir.write_store_uuid(store_uuid)
    assert state_dir.read_store_uuid() == store_uuid
    for damage in (b"", b"zz" * 16, b"ab" * 15, b"\xff" * 32):
        (tmp_path / "store.id").write_bytes(damage)
        assert state_dir.read_store_uuid() is None
    state_dir.close()


def test_the_directory_itself_survives_a_power_cut(tmp_path, monkeypatch):
    """A file that was synced is lost all the same when no directory above it knows the one below."""
    synced = set()
    fsync = os.fsync

    def watched(fd):
        synced.add(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", watched)
    StateDir(tmp_path / "a" / "b" / "state").close()
    assert synced >= {str(tmp_path / part) for part in ("", "a", "a/b", "a/b/state")}
    synced.clear()
    StateDir(tmp_path / "a" / "b" / "state").close()
    assert not synced, "what is there needs no more"
