"""`python -m mii_hcache profile`: measure what plans are made of, on this machine, for one model."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from mii_hcache.config import DTYPE_NAMES, HCacheConfig, quiet_libraries
from mii_hcache.core.cost import LayerCost, MeasuredProfile
from mii_hcache.core.geometry import ChunkKind, ModelGeometry
from mii_hcache.errors import ConfigError
from mii_hcache.storage.state_dir import PROFILE_FILE, StateDir
from mii_hcache.storage.stripe_set import StripeSet
from mii_hcache.tools.directories import add_state_dir, chosen_dirs
from mii_hcache.tools.progress import Progress
from mii_hcache.tools.table import size, table

_DESCRIPTION = """\
Loads the model and measures what one of its layers costs here: reading saved state from memory and from files (cold),
projecting K and V from hidden states, placing K and V, computing tokens again, and how much reading and computing slow
each other down. The result is kept in the state directory; servers there plan with it, and correct it by what their
restores really take. A server without one measures for itself when it first starts, more briefly.
"""
_EXAMPLES = """\
examples:
  python -m mii_hcache profile --model ./llama --state-dir /nvme/state
  python -m mii_hcache profile --model ./llama --tensor-parallel 2
      for a server over two ranks; a profile of one rank says nothing about them
  python -m mii_hcache profile --model ./llama --json > here.json
      for `plan --profile here.json`, on any machine

exit status: 0 measured, 2 not (one line says why)
"""
_TOKENS = 1024
"""Numbers are printed for so many."""


def main(arguments: Sequence[str] | None = None) -> int:
    """0. Raises HCacheError."""
    options = _parser().parse_args(arguments)
    directories = chosen_dirs(options.state_dir)
    if len(directories) > 1:
        seats = StripeSet.of([one.absolute() for one in directories]).seats
        missing = [f"{seat.path}: {seat.why_missing}" for seat in seats if seat.why_missing is not None]
        if missing:
            raise ConfigError(f"not all directories of the set are there ({'; '.join(missing)})")
        directories = [seat.path for seat in seats]
    quiet_libraries()
    progress = Progress()
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed writes to stdout, which may be read by a script
        profile, geometry = _measure(options, directories, progress)
    progress.clear()
    print(profile.to_json() if options.json else "\n".join(_lines(profile, geometry, directories[0])), end="")
    return 0


def _measure(
    options: argparse.Namespace, directories: Sequence[Path], progress: Progress
) -> tuple[MeasuredProfile, ModelGeometry]:
    progress.show(f"loading {options.model or 'the demo model'}")
    from mii_hcache.engine.measuring import measured_profile
    from mii_hcache.engine.open import load_engine
    from mii_hcache.engine.parallel.engine import ParallelEngine
    from mii_hcache.engine.parallel.state import SharedState

    with ExitStack() as stack:
        for directory in directories:  # nobody else may read or write there meanwhile
            stack.callback(StateDir(directory).close)
        config = HCacheConfig(
            model=options.model,
            dtype=options.dtype,
            max_batch_tokens=options.max_batch_tokens,
            tensor_parallel=options.tensor_parallel,
        )
        loaded = load_engine(config, directories[0])
        stack.callback(loaded.engine.close)
        is_parallel = isinstance(loaded.engine, ParallelEngine)
        profile = measured_profile(
            loaded.engine,
            directories,
            loaded.fingerprint,
            io_bytes=options.read_mib << 20,
            repeats=options.repeats,
            anew=True,
            io=config.io,
            shared=SharedState(loaded.engine, io=config.io) if is_parallel else None,
            on_progress=progress.show,
        )
        return profile, loaded.engine.geometry


def _lines(profile: MeasuredProfile, geometry: ModelGeometry, directory: Path) -> list[str]:
    header = [
        f"one layer, {_TOKENS:,} tokens, ms",
        "read hidden",
        "read kv",
        "project",
        "place kv",
        "compute",
        "reads slowed",
        "computing slowed",
    ]
    rows = [_row(tier, cost) for tier, cost in profile.tiers.items()]
    rates = [
        f"  {tier}: {size(geometry.row_bytes(ChunkKind.KV) / cost.io_kv_s)}/s"
        for tier, cost in profile.tiers.items()
        if cost.io_kv_s
    ]
    return [
        f"machine  {profile.machine}",
        f"model    {profile.model[:16]}, {geometry.num_layers} layers of {geometry.hidden_size}, {geometry.dtype}",
        f"saved    {directory / PROFILE_FILE}, {profile.date}",
        "",
        table(header, rows),
        "",
        "K and V are read at",
        *rates,
        *([f"and copied to the GPU at {size(profile.h2d_bytes_per_s)}/s"] if profile.h2d_bytes_per_s else []),
        *[
            f"Projecting takes {1e3 * _TOKENS * cost.c_gather_s:.3f} ms of that to gather rows from all ranks ({tier})."
            for tier, cost in profile.tiers.items()
            if cost.c_gather_s
        ],
        *(
            [f"The machine was busy: the same work took up to {profile.spread:.1f} times as long. Measure again."]
            if profile.is_doubtful
            else []
        ),
        "",
    ]


def _row(tier: str, cost: LayerCost) -> list[str]:
    from mii_hcache.runtime.pieces import HOST
    from mii_hcache.runtime.profiler import MAX_SLOWDOWN  # imports here, so that `--help` answers at once

    def slowed(factor: float) -> str:
        return f"x {factor:.2f}{' or more' if factor >= MAX_SLOWDOWN else ''}"

    return [
        tier,
        f"{1e3 * _TOKENS * cost.io_hidden_s:.3f}",
        f"{1e3 * _TOKENS * cost.io_kv_s:.3f}",
        f"{1e3 * _TOKENS * cost.c_hidden_s:.3f}",
        f"{1e3 * _TOKENS * cost.c_kv_s:.3f}",
        f"{1e3 * cost.spread(HOST.alone_fill_tokens).forward_s(0, _TOKENS):.3f}",
        slowed(cost.io_slowdown),
        slowed(cost.compute_slowdown),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mii_hcache profile",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", metavar="PATH_OR_HUB_ID", help="checkpoint (default: the demo model)")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, default="auto", help="as for the server (default: auto)")
    add_state_dir(parser, "whose disk is measured, and where it is kept")
    parser.add_argument(
        "--read-mib", type=int, default=128, metavar="N", help="read so much of each kind from each tier (default: 128)"
    )
    parser.add_argument(
        "--repeats", type=int, default=9, metavar="N", help="the least of so many counts (default: %(default)s)"
    )
    parser.add_argument(
        "--max-batch-tokens", type=int, default=768, metavar="N", help="as for the server (default: 768)"
    )
    parser.add_argument(
        "--tensor-parallel",
        type=int,
        default=1,
        metavar="N",
        help="as for the server: all ranks read, gather and place together (default: 1)",
    )
    parser.add_argument("--json", action="store_true", help="print the profile as JSON")
    return parser
