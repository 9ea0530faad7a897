"""The command line of the server: what can be set, checked before anything is loaded."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mii_hcache.config import (
    DTYPE_NAMES,
    IO_NAMES,
    KEEP_POLICIES,
    HCacheConfig,
    default_state_dir,
    environment_api_keys,
)
from mii_hcache.core.methods import METHODS
from mii_hcache.errors import ConfigError
from mii_hcache.serve.access import ANY, Access, host_name
from mii_hcache.serve.keys import collect_keys

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_DESCRIPTION = """\
An OpenAI-compatible server whose conversations come back fast. It keeps the state of every conversation on disk and
restores it at the next turn, also after a restart. Clients need nothing special: the conversation that they send again
is the key.
"""
_EXAMPLES = """\
examples:
  python -m mii_hcache.serve
      a demo: a small model with random weights, made on the spot; it talks gibberish
  python -m mii_hcache.serve --model meta-llama/Llama-2-7b-chat-hf --state-dir /nvme/state --state-capacity 500GiB
      a model of the Hugging Face hub, with room for many conversations on a fast disk
  python -m mii_hcache.serve --model ./my-checkpoint --keep none
      evict after every turn, so that each turn is restored: for measuring
  MII_HCACHE_API_KEY=... python -m mii_hcache.serve --model ./my-checkpoint --host 0.0.0.0 --allowed-host llm.example
      for other machines, which call it llm.example

Ctrl-C or SIGTERM finishes the running answers, writes what is not on disk yet and exits. A second one does not wait.
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says."""

    config: HCacheConfig
    host: str
    port: int
    """0: any free port."""
    access: Access
    allow_no_key: bool
    """Listen to other machines without any key."""
    verbose: bool
    log_json: bool


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """Raises ConfigError; leaves by SystemExit (2) where argparse itself sees the mistake, (0) after `--help`."""
    values = _parser().parse_args(arguments)
    config = HCacheConfig(
        model=values.model,
        served_model_name=values.served_model_name,
        dtype=values.dtype,
        state_dir=_state_dir(values.state_dir),
        state_capacity_bytes=values.state_capacity,
        dram_capacity_bytes=values.dram_capacity,
        io=values.io,
        method=None if values.method == "auto" else values.method,
        keep=values.keep,
        kv_blocks=values.kv_blocks,
        max_batch_tokens=values.max_batch_tokens,
        max_waiting=values.max_waiting,
        max_context_tokens=values.max_context,
        save_wait=values.save_wait,
        save_after=values.save_after,
        restore_slice_s=values.restore_slice / 1e3,
        emulated_read_bytes_per_s=values.emulate_read_speed,
        trace=values.trace,
    )
    return Options(
        config=config,
        host=values.host,
        port=values.port,
        access=Access(
            keys=collect_keys(values.api_key, values.api_key_file, environment_api_keys()),
            hosts=(values.host, *values.allowed_host),
            origins=tuple(values.allowed_origin),
        ),
        allow_no_key=values.allow_no_key,
        verbose=values.verbose,
        log_json=values.log_json,
    )


def _state_dir(text: str | None) -> str | None:
    if text is None:
        return None
    path = Path(text).expanduser()
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--state-dir must be a directory, {str(path)!r} is a file")
    return str(path)


def parse_size(text: str) -> int:
    """Bytes of `20GiB`, `512 MiB`, `1.5T`, `1000000`. `GB` is taken as `GiB`: nobody means a tenth less."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 20GiB, 512MiB or a number of bytes")
    number, prefix, _ = match.groups()
    return int(float(number) * 2 ** (10 * " kmgt".index(prefix.lower() or " ")))


def format_size(num_bytes: int) -> str:
    """The shortest way to write a size that `parse_size` reads."""
    for exponent, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if num_bytes >= 1 << exponent:
            return f"{num_bytes / (1 << exponent):.4g}{unit}"
    return f"{num_bytes}"


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; write a number from 1 to 65535, or 0 for any free one")
    return int(text)


def _host(text: str) -> str:
    if text != ANY and host_name(text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no host; write a name, a name and a port, or * for any")
    return text


def _origin(text: str) -> str:
    if text != ANY and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+/?", text.lower()):
        raise argparse.ArgumentTypeError(f"{text!r} is no origin; write scheme://host or scheme://host:port, or *")
    return text


def _parser() -> argparse.ArgumentParser:
    defaults = HCacheConfig()
    parser = argparse.ArgumentParser(
        prog="python -m mii_hcache.serve",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    model = parser.add_argument_group("model")
    model.add_argument("--model", metavar="PATH_OR_HUB_ID", help="checkpoint (default: a small random demo model)")
    model.add_argument("--served-model-name", metavar="NAME", help="what clients call it (default: from --model)")
    model.add_argument(
        "--dtype", choices=DTYPE_NAMES, default=defaults.dtype, help="of weights and state (default: %(default)s)"
    )
    model.add_argument(
        "--max-context",
        type=int,
        metavar="TOKENS",
        help="longest conversation, prompt and answer together (default: the model's)",
    )

    state = parser.add_argument_group("saved state")
    state.add_argument(
        "--state-dir", metavar="DIR", help=f"where it is kept; one server at a time (default: {default_state_dir()})"
    )
    state.add_argument(
        "--state-capacity",
        type=parse_size,
        default=defaults.state_capacity_bytes,
        metavar="SIZE",
        help="most of it on disk, least recently used goes first "
        f"(default: {format_size(defaults.state_capacity_bytes)})",
    )
    state.add_argument(
        "--dram-capacity",
        type=parse_size,
        default=defaults.dram_capacity_bytes,
        metavar="SIZE",
        help=f"most of it in host memory, before the disk (default: {format_size(defaults.dram_capacity_bytes)})",
    )
    state.add_argument(
        "--io",
        choices=IO_NAMES,
        default=defaults.io,
        help="how it gets to the disk and back: by the native engine on io_uring, by Python's threads, or by the first "
        "that works here; cufile adds GPUDirect Storage (experimental: its authors never ran it on a GPU); the "
        "files are the same (default: %(default)s)",
    )
    state.add_argument(
        "--method",
        choices=tuple(METHODS),
        default="auto",
        help="; ".join(f"{method.name}: {method.summary}" for method in METHODS.values()) + " (default: %(default)s)",
    )
    state.add_argument(
        "--emulate-read-speed",
        type=parse_size,
        metavar="SIZE",
        help="slow reads of it down to so many bytes a second, as another disk would; plans count with it "
        "(default: no)",
    )
    state.add_argument(
        "--save-wait",
        type=float,
        default=defaults.save_wait,
        metavar="SHARE",
        help="share of a prefill step that it may wait for room to save its state (default: %(default)s)",
    )
    state.add_argument(
        "--save-after",
        type=int,
        default=defaults.save_after,
        metavar="N",
        help="save what this many earlier prompts had, for one-shot traffic; 0 saves everything (default: %(default)s)",
    )

    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--keep",
        choices=KEEP_POLICIES,
        default=defaults.keep,
        help="after a turn, leave its KV blocks in place until they are needed (lru), or evict them at once (none) "
        "(default: %(default)s)",
    )
    engine.add_argument(
        "--kv-blocks", type=int, metavar="N", help="KV blocks in the pool (default: what memory allows)"
    )
    engine.add_argument(
        "--max-batch-tokens",
        type=int,
        default=defaults.max_batch_tokens,
        metavar="N",
        help="most tokens of one engine step (default: %(default)s)",
    )
    engine.add_argument(
        "--restore-slice",
        type=float,
        default=defaults.restore_slice_s * 1e3,
        metavar="MS",
        help="longest that a restore holds up running answers at a time (default: %(default)g)",
    )

    engine.add_argument(
        "--max-waiting",
        type=int,
        default=defaults.max_waiting,
        metavar="N",
        help="most requests that wait for a place; one more is told to come back later (default: %(default)s)",
    )
    _add_server_options(parser)
    return parser


def _add_server_options(parser: argparse.ArgumentParser) -> None:
    server = parser.add_argument_group("server")
    server.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; another than this needs a key (default: %(default)s)"
    )
    server.add_argument("--port", type=_port, default=8000, help="0 takes any free one (default: %(default)s)")
    server.add_argument("--verbose", "-v", action="store_true", help="a line for each request, and what libraries say")
    server.add_argument(
        "--trace", metavar="FILE", help="write the timeline of every restore there, for Perfetto or chrome://tracing"
    )
    server.add_argument(
        "--log-json", action="store_true", help="write lines of JSON to stderr, one for each request of the API"
    )

    access = parser.add_argument_group("access")
    access.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="ask for this key, everywhere but at /health; may be given several times, two keys never share state. "
        "Other users of this machine can read it here: $MII_HCACHE_API_KEY or a file is better",
    )
    access.add_argument(
        "--api-key-file", action="append", default=[], metavar="FILE", help="a file of such keys, one a line"
    )
    access.add_argument("--allow-no-key", action="store_true", help="listen to other machines although there is no key")
    access.add_argument(
        "--allowed-host",
        action="append",
        type=_host,
        default=[],
        metavar="HOST",
        help="a name that clients call this server by, beside localhost, --host and the address they reach; "
        "may be given several times",
    )
    access.add_argument(
        "--allowed-origin",
        action="append",
        type=_origin,
        default=[],
        metavar="ORIGIN",
        help="a site whose pages may use this server, such as https://chat.example; may be given several times",
    )
