"""A store on a raw NVMe namespace: whose it is, what a crash leaves, what a lost device does."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from mii_hcache.errors import ConfigError, CorruptChunkError
from mii_hcache.storage import pyspdk
from mii_hcache.storage.format import BLOCK_BYTES, SegmentHeader, seal
from mii_hcache.storage.native import why_not_built
from mii_hcache.storage.nvme import NvmeAddress, NvmeFile
from mii_hcache.storage.slots import SlotPool
from mii_hcache.storage.state_dir import StateDir
from mii_hcache.storage.superblock import Superblock, describe_block
from tests.storage.namespace_kit import REGION_BYTES, Site
from tests.storage.storage_kit import PAUSE_S, SLOT_BYTES, holds, make_record, put, wait_until_here

pytestmark = pytest.mark.skipif(why_not_built() is not None, reason=str(why_not_built()))

ROOT = Path(__file__).resolve().parents[2]


def test_a_blank_namespace_is_formatted_and_filled(site, capsys):
    assert site.format() == 0
    store = site.open()
    assert store.io.name == "spdk" and "experimental" in store.io_reason
    records = [make_record(name) for name in range(20)]
    assert all(put(store, record) for record in records)
    assert all(holds(store, record) for record in records)
    assert not list((site.state / "segments").iterdir())
    store = site.open()
    assert store.notes == []
    assert all(holds(store, record) for record in records)
    store.delete([record.span_id for record in records])
    store.flush()
    assert store.disk_bytes == 0
    content = site.image.read_bytes()
    firsts = [content[start : start + BLOCK_BYTES] for start in range(REGION_BYTES, 20 * REGION_BYTES, REGION_BYTES)]
    assert firsts == [bytes(BLOCK_BYTES)] * 19, "regions are free again"
    store = site.open()
    assert not any(store.find(record.span_id) for record in records)


def test_regions_are_used_again_and_again(site):
    """More segments than there are regions come and go, of two sizes, in room for the half of them."""
    site.format()
    store = site.open(1 << 40)
    num_seen = 0
    for name in range(60):
        record = make_record(name, chunk_bytes=(200_000, 90_000)[name // 10 % 2])
        assert put(store, record), name
        assert holds(store, record)
        num_seen += 1
    stats = store.stats()
    assert stats.evicted_spans > 0 and stats.num_spans + stats.evicted_spans == num_seen
    store = site.open(1 << 40)
    assert store.stats().num_spans == stats.num_spans


def test_a_chunk_larger_than_a_region_is_dropped(site):
    site.format()
    store = site.open(1 << 40)
    assert not put(store, make_record("large", chunk_bytes=REGION_BYTES))
    assert store.stats().dropped_spans == 1
    assert put(store, make_record("small"))


def test_a_pool_of_numbers_gives_each_to_one_segment():
    pool = SlotPool(1 << 40, 3 * SLOT_BYTES + BLOCK_BYTES, numbers=[3, 5])
    first = pool.take({SLOT_BYTES: 4})
    assert {place.segment for place in first[SLOT_BYTES]} == {3, 5}
    assert pool.missing_bytes({SLOT_BYTES: 2}) <= 0 < pool.missing_bytes({SLOT_BYTES: 3})
    assert pool.take({SLOT_BYTES: 3}) is None and pool.take({2 * BLOCK_BYTES: 1}) is None
    assert not pool.fits({SLOT_BYTES: 7}) and pool.fits({SLOT_BYTES: 6}) and not pool.fits({1 << 20: 1})
    pool.give(first[SLOT_BYTES])
    assert sorted(pool.take_empty()) == [3, 5]
    assert pool.take({SLOT_BYTES: 1}) is None, "their headers are still there"
    pool.forget_bytes()
    assert pool.take({SLOT_BYTES: 6}) is not None


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"\1" * 10, "unknown kind"),
        (b"XFSB", "XFS"),
        (bytes(1080) + b"\x53\xef", "ext4"),
        (bytes(512) + b"EFI PART", "partition table"),
    ],
)
def test_a_namespace_that_holds_something_is_not_formatted(site, capsys, content, what):
    site.overwrite(0, content)
    assert site.format() == 2
    assert what in capsys.readouterr().err
    assert site.block(0).startswith(content)
    assert site.format("--force") == 0
    assert describe_block(site.block(0)).startswith("saved state of the store")


def test_a_namespace_of_another_store_is_refused(site, tmp_path, capsys):
    site.format()
    (tmp_path / "x").mkdir()
    other = Site(tmp_path / "x")
    other.trid = site.trid
    assert other.format() == 2 and "saved state of the store" in capsys.readouterr().err
    assert other.format("--force") == 0
    with pytest.raises(ConfigError, match="another store"):
        site.open()
    other.open()
    other.close()


def test_what_is_saved_is_not_formatted_away_by_mistake(site, capsys):
    site.format()
    put(site.open(), make_record("a"))
    site.close()
    assert site.format() == 2 and "already" in capsys.readouterr().err
    assert holds(site.open(), make_record("a"))
    site.close()
    assert site.format("--force") == 0
    store = site.open()
    assert store.find(make_record("a").span_id) is None
    assert "gone" in store.notes[0]


@pytest.mark.parametrize("torn", [1, 100, 4095])
def test_a_torn_superblock_is_refused(site, torn):
    site.format()
    site.overwrite(0, site.block(0)[:torn] + b"\xff" * (BLOCK_BYTES - torn))
    with pytest.raises(ConfigError, match="not formatted for us"):
        site.open()


def test_a_namespace_that_shrank_or_is_gone_is_refused(site):
    site.format()
    os.truncate(site.image, 10 << 20)
    with pytest.raises(ConfigError, match="smaller"):
        site.open()
    site.image.unlink()
    with pytest.raises(ConfigError, match="no NVMe controller answers"):
        site.open()


def test_hostile_superblocks():
    good = Superblock(store_uuid=bytes(16), region_bytes=1 << 20, num_regions=4, first_region=1 << 20)
    assert Superblock.parse(good.pack()) == good
    for field in ("region_bytes", "num_regions", "first_region"):
        for value in (0, 1, BLOCK_BYTES - 1):
            if (field, value) != ("num_regions", 1) and (field, value) != ("num_regions", BLOCK_BYTES - 1):
                with pytest.raises(CorruptChunkError):
                    Superblock.parse(Superblock(**{**vars(good), field: value}).pack())
    for byte in range(0, BLOCK_BYTES, 13):
        damaged = bytearray(good.pack())
        damaged[byte] ^= 1
        with pytest.raises(CorruptChunkError):
            Superblock.parse(damaged)


def test_regions_of_others_are_left_alone_and_damaged_ones_are_used(site):
    site.format()
    foreign = SegmentHeader(store_uuid=b"x" * 16, slot_bytes=8192, num_slots=2).pack()
    first = REGION_BYTES
    with closing(StateDir(site.state)) as state_dir:
        store_uuid = state_dir.read_store_uuid()
    too_many = SegmentHeader(store_uuid=store_uuid, slot_bytes=8192, num_slots=1 << 20)
    site.overwrite(first, foreign)
    site.overwrite(first + REGION_BYTES, seal(b"HCACHESG" + b"\1" * 100))
    site.overwrite(first + 2 * REGION_BYTES, too_many.pack())
    site.close()
    store = site.open()
    assert [note.split(" (")[0] for note in store.notes] == [
        "region 1 was left alone",
        "the header of region 2 is damaged",
        "the header of region 3 is damaged",
    ]
    records = [make_record(name) for name in range(50)]
    assert all(put(store, record) for record in records)
    store = site.open()
    assert store.notes[0].startswith("region 1 was left alone")
    assert all(holds(store, record) for record in records)
    assert site.image.read_bytes()[first : first + BLOCK_BYTES] == foreign


def test_rows_are_written_after_the_devices_cache_was_flushed(tmp_path):
    """The fake's cache is lost when the connection ends: what is durable was flushed."""
    site = Site(tmp_path, words=" cache:on")
    site.format()
    records = [make_record(name) for name in range(10)]
    for record in records:
        store = site.open(flush_interval_s=None, durability="strict")
        put(store, record)
    store = site.open()
    assert all(holds(store, record) for record in records)
    site.close()


def test_what_was_not_flushed_is_a_miss_after_a_loss_of_power(tmp_path, monkeypatch):
    site = Site(tmp_path, words=" cache:on")
    site.format()
    store = site.open(flush_interval_s=None, durability="strict")
    durable, lost = make_record("durable"), make_record("lost")
    put(store, durable)
    store.flush()
    put(store, lost)
    monkeypatch.setattr(NvmeFile, "flush", lambda self: None)  # a device that lies about its cache
    store = site.open()
    assert holds(store, durable)
    assert store.find(lost.span_id) is not None, "the catalog believed the device"
    assert not holds(store, lost), "and the checks do not"
    site.close()


def test_a_killed_process_leaves_what_was_flushed(site):
    """As test_file_crash, on the bytes of a namespace, which outlive the process."""
    site.format()
    names: set[int] = set()
    for seed in range(3):
        command = [sys.executable, "-m", "tests.storage.crash_writer", str(site.state), str(seed), "uniform"]
        writer = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        promised: set[int] = set()
        stop_s = time.monotonic() + 120
        num_flushed = 0
        for line in writer.stdout:
            word, *rest = line.split()
            if word == "flushed":
                promised, num_flushed = {int(name) for name in rest}, num_flushed + 1
            elif word == "evicting":
                promised = set()
            elif word == "deleting":
                promised.discard(int(rest[0]))
            if num_flushed > 20 + 7 * seed or time.monotonic() > stop_s:
                break
        writer.send_signal(signal.SIGKILL)
        for line in writer.stdout:  # said before it died
            word, *rest = line.split()
            if word == "flushed":
                promised = {int(name) for name in rest}
            else:
                promised = set() if word == "evicting" else promised - {int(name) for name in rest}
        writer.wait()
        assert num_flushed > 5
        store = site.open()
        for name in promised:
            assert holds(store, make_record(name)), f"span {name} was flushed"
        for name in range(12):
            holds(store, make_record(name))  # and nothing wrong is served
        assert store.stats().corrupt_chunks == 0
        names |= promised
        site.close()
    assert names


def test_errors_of_the_device_cost_spans_and_no_more(site):
    site.format()
    store = site.open(first_pause_s=PAUSE_S)
    records = [make_record(name) for name in range(6)]
    for record in records[:3]:
        assert put(store, record)
    store.io.device.fault = lambda is_write, offset, num_bytes: -5 if is_write else None
    assert not put(store, records[3])
    store.io.device.fault = None
    wait_until_here(store)
    assert put(store, records[4])
    assert all(holds(store, record) for record in (*records[:3], records[4]))


def test_addresses():
    address = NvmeAddress.parse("trtype:PCIe traddr:0000:81:00.0 ns:3")
    assert (address.transport_id, address.namespace_id) == ("trtype:PCIe traddr:0000:81:00.0", 3)
    assert address.is_pcie and address.hugepages and address.memory_mib == 0 and not address.is_fake
    address = NvmeAddress.parse("trtype:TCP traddr:127.0.0.1 trsvcid:4420 subnqn:nqn.2016-06.io.spdk:x")
    assert not (address.hugepages or address.is_pcie) and address.memory_mib == 512
    assert address.transport_id.endswith("subnqn:nqn.2016-06.io.spdk:x")
    for wrong in ("", "PCIe", "trtype:PCIe", "trtype:PCIe traddr:x ns:0", "trtype:PCIe traddr:x ns:y", "a: trtype:x"):
        with pytest.raises(ConfigError):
            NvmeAddress.parse(wrong)


def test_the_command_line(site, capsys):
    assert pyspdk.main(["probe", "--trid", site.trid]) == 0
    assert "it seems to hold nothing" in capsys.readouterr().out
    assert pyspdk.main(["bench", "--trid", site.trid, "--seconds", "1", "--write", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["read"]["bytes_per_s"] > 0 and facts["write"]["requests_per_s"] > 0
    assert pyspdk.main(["probe", "--trid", site.trid, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["namespaces"][0]["holds"] == "data of unknown kind"
    assert pyspdk.main(["bench", "--trid", site.trid, "--write"]) == 2
    assert pyspdk.main(["probe", "--json"]) == 0
    with pytest.raises(SystemExit) as ended:
        pyspdk.main(["--help"])
    assert ended.value.code == 0
    assert "EXPERIMENTAL" in capsys.readouterr().out


def test_without_spdk_it_says_how_to_build_it_in(capsys, monkeypatch):
    monkeypatch.setattr("mii_hcache.storage.nvme.why_no_spdk", lambda: "the native engine was built without SPDK")
    assert pyspdk.main(["probe", "--trid", "trtype:PCIe traddr:0000:81:00.0"]) == 2
    error = capsys.readouterr().err
    assert "built without SPDK" in error and "spdk.io/doc" in error and "PKG_CONFIG_PATH" in error


def test_a_gpus_memory_is_read_into_from_python(site, tmp_path):
    """The fake "GPU" of tests/native/fakes: only the mapping sees its memory."""
    if shutil.which("g++") is None:
        pytest.skip("no g++: the fake libgdrapi cannot be built")
    library = tmp_path / "libgdrapi.so.2"
    source = ROOT / "tests" / "native" / "fakes" / "fake_gdrapi.cpp"
    subprocess.run(["g++", "-std=c++20", "-O1", "-fPIC", "-shared", str(source), "-o", str(library)], check=True)
    fake = ctypes.CDLL(str(library))
    fake.fake_gpu_address.restype = ctypes.c_ulong
    fake.fake_gpu_read.argtypes = [ctypes.c_ulong, ctypes.c_char_p, ctypes.c_size_t]
    site.format()
    content = os.urandom(1 << 20)
    site.overwrite(4 << 20, content)
    namespace = NvmeFile(NvmeAddress.parse(site.trid))
    window = namespace.map_gpu(fake.fake_gpu_address(), 2 << 20, str(library))
    view = memoryview(window)
    batch = namespace.device.submit([(False, namespace.native, 4 << 20, view[: 1 << 20])])
    assert batch.wait_all() == [1 << 20]
    batch.close()
    seen = ctypes.create_string_buffer(1 << 20)
    fake.fake_gpu_read(window.address, seen, 1 << 20)
    assert seen.raw == content
    del view, batch, window
    assert fake.fake_gdr_num_open() == 0
    with pytest.raises(ConfigError, match="not installed"):
        namespace.map_gpu(0, 1 << 20, "libgdrapi-of-nobody.so")
    namespace.close()
