"""The command line: sizes, defaults, mistakes."""

import re
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mii_hcache.config import HCacheConfig
from mii_hcache.core.amounts import format_size, parse_size
from mii_hcache.errors import ConfigError
from mii_hcache.serve.options import _NO_OPTIONS, _parser, as_options, parse_options


@pytest.fixture(autouse=True)
def no_keys_around(monkeypatch):
    monkeypatch.delenv("MII_HCACHE_API_KEY", raising=False)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("20GiB", 20 << 30),
        ("512 MiB", 512 << 20),
        ("512m", 512 << 20),
        ("1.5T", 3 << 39),
        ("2gb", 2 << 30),
        ("64KB", 64 << 10),
        ("1048576", 1 << 20),
        ("7b", 7),
    ],
)
def test_sizes(text, num_bytes):
    assert parse_size(text) == num_bytes


@given(exponent=st.integers(0, 4), number=st.integers(1, 1023))
def test_sizes_are_written_as_they_are_read(exponent, number):
    num_bytes = number << (10 * exponent)
    assert parse_size(format_size(num_bytes)) == num_bytes


def test_no_arguments_are_the_defaults(monkeypatch):
    options = parse_options([])
    assert options.config == HCacheConfig()
    assert (options.host, options.port) == ("127.0.0.1", 8000)  # nobody else's machine by default
    assert not (len(options.access.keys) or options.access.origins or options.allow_no_key)
    assert not (options.verbose or options.log_json)


def test_every_setting_arrives(tmp_path):
    options = parse_options(
        "--model m --served-model-name n --dtype bfloat16 --state-capacity 3GiB --dram-capacity 1GiB --method kv "
        "--keep none --kv-blocks 7 --max-batch-tokens 5 --max-context 99 --save direct --save-wait 0.5 "
        "--durability strict --evict cost --expire-after 1.5h --save-after 2 --restore-slice 2.5 "
        "--emulate-read-speed 100MiB --kernels portable "
        "--max-waiting 3 --host 0.0.0.0 --port 0 --verbose --log-json --allow-no-key --api-key one --api-key two "
        "--allowed-host llm.example --allowed-host *:8 --allowed-origin https://a.example "
        f"--state-dir {tmp_path / 'new'}".split()
    )
    assert options.config == HCacheConfig(
        model="m",
        served_model_name="n",
        dtype="bfloat16",
        state_dir=str(tmp_path / "new"),
        state_capacity_bytes=3 << 30,
        dram_capacity_bytes=1 << 30,
        durability="strict",
        evict="cost",
        expire_after_s=5400.0,
        method="kv",
        keep="none",
        kernels="portable",
        kv_blocks=7,
        max_batch_tokens=5,
        max_waiting=3,
        max_context_tokens=99,
        save="direct",
        save_wait=0.5,
        save_after=2,
        restore_slice_s=0.0025,
        emulated_read_bytes_per_s=100 << 20,
    )
    assert (options.host, options.port) == ("0.0.0.0", 0)
    assert options.verbose and options.log_json and options.allow_no_key
    assert options.access.keys.tenant_of(b"one") and options.access.keys.tenant_of(b"two")
    assert options.access.hosts == ("0.0.0.0", "llm.example", "*:8")
    assert options.access.origins == ("https://a.example",)


def test_auto_method_is_left_to_the_engine():
    assert parse_options(["--method", "auto"]).config.method is None


def test_home_directories_are_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse_options(["--state-dir", "~/state"]).config.state_dir == str(tmp_path / "state")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--expire-after soon", "'soon' is no time; write 12h"),
        ("--state-capacity lots", "'lots' is no size; write 20GiB"),
        ("--state-capacity -5GiB", "expected one argument"),
        ("--port 70000", "'70000' is no port"),
        ("--port x", "'x' is no port"),
        ("--method magic", "hidden"),
        ("--keep all", "lru"),
        ("--save later", "two-stage"),
        ("--dtype int8", "bfloat16"),
        ("--nothing", "unrecognized arguments: --nothing"),
        ("--mod x", "unrecognized arguments: --mod"),
        ("--allowed-host a/b", "'a/b' is no host; write a name"),
        ("--allowed-origin chat.example", "'chat.example' is no origin; write scheme://host"),
        ("--allowed-origin https://chat.example/page", "is no origin"),
    ],
)
def test_mistakes_that_argparse_sees(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        parse_options(arguments.split())
    told = capsys.readouterr().err
    assert caught.value.code == 2 and message in told
    assert len(told.splitlines()) == 2 and "--help" in told, "forty options would hide what is wrong"


@pytest.mark.parametrize(
    "arguments",
    [
        "--kv-blocks 0",
        "--max-waiting 0",
        "--state-capacity 5",
        "--restore-slice 0",
        "--emulate-read-speed 0",
        "--save-wait -1",
        "--save-after -1",
    ],
)
def test_mistakes_that_the_settings_see(arguments):
    with pytest.raises(ConfigError):
        parse_options(arguments.split())


def test_settings_are_called_by_their_options():
    known = set(re.findall(r"--[a-z-]+", _parser().format_help()))
    for name in {field.name for field in fields(HCacheConfig)} - set(_NO_OPTIONS):
        (option,) = re.findall(r"^(--[a-z-]+) is wrong$", as_options(f"{name} is wrong"))
        assert option in known
    for words in ("block_size must be >= 1", "state directory /a is in use", "", "/a is no model"):
        assert as_options(words) == words


def test_a_state_dir_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        parse_options(["--state-dir", str(tmp_path / "file")])


def test_state_may_be_striped_over_disks(monkeypatch):
    config = parse_options(["--state-dir", "/b", "--io", "threads", "--state-dir", "/c"]).config
    assert config.state_dirs == ("/b", "/c")
    assert parse_options(["--state-dir", "/b"]).config.state_dirs == ("/b",)
    monkeypatch.setenv("MII_HCACHE_STATE_DIR", "/d:/e")
    assert parse_options([]).config.state_dirs == ("/d", "/e")
    assert parse_options(["--state-dir", "/b"]).config.state_dirs == ("/b",)
