"""The command line of the server: what can be set, checked before anything is loaded."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from mii_hcache.config import (
    DTYPE_NAMES,
    DURABILITY_NAMES,
    EVICTION_NAMES,
    IO_NAMES,
    KEEP_POLICIES,
    KERNEL_NAMES,
    SAVE_NAMES,
    HCacheConfig,
    default_state_dirs,
    environment_api_keys,
)
from mii_hcache.core.amounts import format_size, parse_duration, parse_size
from mii_hcache.core.methods import METHODS
from mii_hcache.errors import ConfigError
from mii_hcache.serve.access import ANY, Access, host_name
from mii_hcache.serve.keys import collect_keys

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
  python -m mii_hcache.serve --model ./my-checkpoint --state-dir /nvme0/state --state-dir /nvme1/state
      over two disks, which are read side by side; either may fail
  python -m mii_hcache.serve --model meta-llama/Llama-2-70b-chat-hf --tensor-parallel 4
      a model that no single GPU holds, over four of them
  python -m mii_hcache.serve --model ./my-checkpoint --keep none
      evict after every turn, so that each turn is restored: for measuring
  MII_HCACHE_API_KEY=... python -m mii_hcache.serve --model ./my-checkpoint --host 0.0.0.0 --allowed-host llm.example
      for other machines, which call it llm.example

Ctrl-C, SIGTERM or a closed terminal ends it: the running answers are finished, what is not on disk yet is written. A
second one does not wait.
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
        kernels=values.kernels,
        state_dir=_state_dirs(values.state_dir),
        state_capacity_bytes=values.state_capacity,
        dram_capacity_bytes=values.dram_capacity,
        io=values.io,
        disk_deadline_s=values.disk_deadline,
        durability=values.durability,
        evict=values.evict,
        expire_after_s=values.expire_after,
        method=None if values.method == "auto" else values.method,
        keep=values.keep,
        tensor_parallel=values.tensor_parallel,
        kv_blocks=values.kv_blocks,
        max_batch_tokens=values.max_batch_tokens,
        max_waiting=values.max_waiting,
        max_context_tokens=values.max_context,
        save=values.save,
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


def as_options(words: str) -> str:
    """An error that begins with the name of a setting, for whoever gave options: under the option's name."""
    name = next(iter(re.findall(r"^\w+", words)), "")
    if name in _NO_OPTIONS or name not in {field.name for field in fields(HCacheConfig)}:
        return words
    return "--" + _RENAMED.get(name, name.replace("_", "-")) + words[len(name) :]


_RENAMED = {
    "state_capacity_bytes": "state-capacity",
    "dram_capacity_bytes": "dram-capacity",
    "expire_after_s": "expire-after",
    "disk_deadline_s": "disk-deadline",
    "max_context_tokens": "max-context",
    "restore_slice_s": "restore-slice",
    "emulated_read_bytes_per_s": "emulate-read-speed",
}
"""Options whose settings carry a unit in their names, or are called otherwise."""
_NO_OPTIONS = ("block_size", "max_sequences", "save_threads", "scatter_threads", "poison_blocks")
"""Settings for those who write Python."""


def _state_dirs(texts: Sequence[str]) -> str | list[str] | None:
    directories = [_state_dir(text) for text in texts]
    return directories if len(directories) > 1 else next(iter(directories), None)


def _state_dir(text: str) -> str:
    path = Path(text).expanduser()
    if os.path.isfile(path):  # False for what cannot be looked at, such as a disk that fails
        raise ConfigError(f"--state-dir must be a directory, {str(path)!r} is a file")
    return str(path)


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
        usage="%(prog)s [options]; --help lists them",  # all of them would hide the line that says what is wrong
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
        "--state-dir",
        action="append",
        default=[],
        metavar="DIR",
        help="where it is kept; one server at a time; given several times, each on a disk of its own, it is striped "
        "over all of them; of several ranks each writes and reads its hidden states on directories of its own, as far "
        f"as there are enough (default: {os.pathsep.join(default_state_dirs())})",
    )
    state.add_argument(
        "--state-capacity",
        type=parse_size,
        default=defaults.state_capacity_bytes,
        metavar="SIZE",
        help=f"most of it on disk, in all directories together (default: {format_size(defaults.state_capacity_bytes)})",
    )
    state.add_argument(
        "--dram-capacity",
        type=parse_size,
        default=defaults.dram_capacity_bytes,
        metavar="SIZE",
        help=f"most of it in host memory, before the disk (default: {format_size(defaults.dram_capacity_bytes)})",
    )
    state.add_argument(
        "--evict",
        choices=EVICTION_NAMES,
        default=defaults.evict,
        help="what goes when room is needed: the least recently used (lru), or what saves least per byte for how "
        "likely it is used again (cost) (default: %(default)s)",
    )
    state.add_argument(
        "--expire-after",
        type=parse_duration,
        metavar="TIME",
        help="delete what was not used for so long, as 12h or 30d, also while the server is down (default: never)",
    )
    state.add_argument(
        "--io",
        choices=IO_NAMES,
        default=defaults.io,
        help="how it gets to the disk and back: by the native engine on io_uring, by Python's threads, or by the first "
        "that works here; cufile adds GPUDirect Storage (experimental: never run on a GPU); the "
        "files are the same (default: %(default)s)",
    )
    state.add_argument(
        "--disk-deadline",
        type=float,
        default=defaults.disk_deadline_s,
        metavar="SECONDS",
        help="a disk that takes longer for one batch of reads or writes is done without until it answers "
        "(default: %(default)g)",
    )
    state.add_argument(
        "--durability",
        choices=DURABILITY_NAMES,
        default=defaults.durability,
        help="after a power cut: what was flushed is there (strict), or it is there or a miss (relaxed), which leaves "
        "the disk its own pace (default: %(default)s)",
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
        "--save",
        choices=SAVE_NAMES,
        default=defaults.save,
        help="snapshot it in the step and write it behind its back, or write it straight to the disk with the step "
        "waiting, past host memory, which is slower: for measuring (default: %(default)s)",
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
        "--tensor-parallel",
        type=int,
        default=defaults.tensor_parallel,
        metavar="N",
        help="split the model over N processes, each on a GPU of its own, or on a share of the CPU's cores; this one "
        "starts the others and ends with them: if one dies the server stops at once, with exit status 3 "
        "(default: %(default)s)",
    )
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
        "--kernels",
        choices=KERNEL_NAMES,
        default=defaults.kernels,
        help="what computes on a GPU: our kernels in Triton, which need nothing but torch (portable), or DeepSpeed's "
        "in CUDA, which want deepspeed-kernels, a matching nvcc and a GPU from A100 to H200 (stock); auto is "
        "portable. Neither has run on a GPU yet. On a CPU there is only portable, in plain torch. State that "
        "one saved is not restored under the other (default: %(default)s)",
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
