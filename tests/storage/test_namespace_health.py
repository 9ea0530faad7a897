"""A namespace that fails, hangs or is exchanged, and what cannot be had of one."""

from __future__ import annotations

import time

import pytest

from mii_hcache.__main__ import main
from mii_hcache.storage.format import BLOCK_BYTES
from mii_hcache.storage.native import why_not_built
from tests.storage.storage_kit import PAUSE_S, holds, make_record, put, wait_until_here

pytestmark = pytest.mark.skipif(why_not_built() is not None, reason=str(why_not_built()))


def test_a_namespace_that_fails_is_away_until_it_answers(site):
    """The state directory's own disk is well: it does not speak for the namespace."""
    site.format()
    store = site.open(first_pause_s=PAUSE_S)
    record = make_record("a")
    assert put(store, record)
    store.io.device.fault = lambda is_write, offset, num_bytes: -5
    assert not holds(store, record)
    time.sleep(0.1)
    assert not store.presence.is_here and store.why_missing(record.span_id) == "unavailable"
    store.io.device.fault = None
    wait_until_here(store)
    assert holds(store, record) and store.stats().corrupt_chunks == 0


def test_another_device_at_its_address_is_not_the_namespace_again(site):
    site.format()
    store = site.open(first_pause_s=PAUSE_S)
    record = make_record("a")
    assert put(store, record)
    superblock = site.block(0)
    store.io.device.fault = lambda is_write, offset, num_bytes: -5
    assert not holds(store, record)
    site.overwrite(0, bytes(BLOCK_BYTES))
    store.io.device.fault = None
    time.sleep(0.1)
    assert not store.presence.is_here
    site.overwrite(0, superblock)
    wait_until_here(store)
    assert holds(store, record)


def test_a_namespace_that_hangs_is_called_back_and_used_again(site):
    from mii_hcache._io import HOLD

    site.format()
    store = site.open(first_pause_s=PAUSE_S, deadline_s=60.0)
    records = [make_record(name) for name in range(3)]
    assert put(store, records[0])
    store.presence.deadline_s = 0.3
    store.io.device.fault = lambda is_write, offset, num_bytes: HOLD
    start_s = time.monotonic()
    assert not put(store, records[1])
    assert time.monotonic() - start_s < 30 and not store.presence.is_here
    assert not put(store, records[2]) and not holds(store, records[0])
    store.presence.deadline_s = 60.0  # a busy machine does not make it hang again
    store.io.device.fault = None
    wait_until_here(store)
    assert put(store, records[1]) and holds(store, records[0]) and holds(store, records[1])


def test_a_namespace_takes_no_drafts_and_whole_spans_instead(site):
    """Rows end anywhere; a device takes whole blocks."""
    site.format()
    store = site.open()
    assert store.drafts is None
    assert put(store, make_record("a")) and holds(store, make_record("a"))


@pytest.mark.parametrize("command", [["fsck", "--state-dir"], ["gc", "--state-dir"], ["inspect", "--verify"]])
def test_tools_for_files_do_not_call_a_namespace_lost(site, command, capsys):
    site.format()
    store = site.open()
    put(store, make_record("a"))
    site.close()
    assert main([*command, str(site.state)]) == 2
    assert "NVMe namespace" in capsys.readouterr().err
    assert main(["inspect", str(site.state)]) == 0
    assert "the segments lie on an NVMe namespace" in capsys.readouterr().out
    assert holds(site.open(), make_record("a"))
