"""`python -m mii_hcache selfcheck`: does a restored conversation say the same, on this model and this machine, and what
does restoring cost?

What it runs is the engine, the saver, the restorer and the stores of a server, one conversation at a time. What it does
not run is the server's scheduler: nothing competes for the engine while a first token is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mii_hcache.config import DTYPE_NAMES, quiet_libraries
from mii_hcache.core.geometry import ChunkKind
from mii_hcache.core.methods import default_method
from mii_hcache.errors import ConfigError, HCacheError
from mii_hcache.tools.conversation import ANSWER_TOKENS, MESSAGE_TOKENS, least_history_tokens
from mii_hcache.tools.injection import Injection
from mii_hcache.tools.progress import Progress
from mii_hcache.tools.report import Report

if TYPE_CHECKING:
    from mii_hcache.engine.ragged_engine import HCacheEngine

RECOMPUTE = "recompute"
NAMES = (*(kind.value for kind in ChunkKind), RECOMPUTE)
"""Methods that are checked: all others are made of these."""

_DESCRIPTION = """\
Proves that restoring works on your model and your machine, and shows what it costs: a conversation of random tokens is
continued once from a context that never left memory (resident), once by computing its history again (recompute), once
for the first time while it is saved (cold), and once by each method from saved state in memory and in files. All must
give the same answers. Takes about a minute, besides loading the model.
"""
_EXAMPLES = """\
examples:
  python -m mii_hcache selfcheck
      the demo model: shows what a report looks like
  python -m mii_hcache selfcheck --model ./llama --dtype bfloat16
      your model, as you would serve it
  python -m mii_hcache selfcheck --model ./llama --state-dir /nvme --history 4096,16384 --seconds 300
      longer conversations, files on the disk that you mean to use
  python -m mii_hcache selfcheck --model ./llama --json > report.json
      for a script; the exit status says the verdict, too

What the columns say:
  reused        tokens of the history that came back instead of being computed: whole spans of 64
  TTFT          from the prompt's token ids to the first token of the answer, median; no other request was running
  speed-up      over recompute
  logit diff    largest difference from the resident context over all answers, and the most it may be. In 16 bit the
                bound is measured: what the same engine differs by when it runs the same tokens in other batches
  K/V diff      of every restored number, relative to the layer's largest; `kv` must come back bit by bit

exit status: 0 all is within its bounds, 1 something is not (the last lines say what), 2 it could not be run
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0 when all is within its bounds, else 1. Raises HCacheError when it could not be run."""
    options = _parser().parse_args(arguments)
    injection = Injection.parse(options.inject) if options.inject else None
    quiet_libraries()
    progress = Progress()
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed writes to stdout, which may be read by a script
        report = _check(options, injection, progress)
    progress.clear()
    print(json.dumps(report.to_dict(), indent=2) if options.json else report.to_text())
    return 1 if report.problems else 0


def _check(options: argparse.Namespace, injection: Injection | None, progress: Progress) -> Report:
    from mii_hcache.runtime.machine import device_name, filesystem_of, software

    with _work_dir(options.state_dir) as directory:
        progress.show(f"loading {options.model or 'the demo model'}")
        try:
            engine = _load(options, directory)
            started_s = time.perf_counter()
            report = Report(
                model=options.model or "the demo model",
                dtype=engine.geometry.dtype,
                machine=device_name(engine.device),
                software=software(),
                state_dir=str(directory),
                filesystem=filesystem_of(directory),
            )
            _measure(options, engine, injection, directory, report, progress)
        except RuntimeError as error:
            if "out of memory" not in str(error).lower():
                raise
            raise HCacheError(f"there is not enough memory; take a shorter --history ({error})") from error
        report.seconds = round(time.perf_counter() - started_s, 1)
    return report


def _measure(
    options: argparse.Namespace,
    engine: HCacheEngine,
    injection: Injection | None,
    directory: Path,
    report: Report,
    progress: Progress,
) -> None:
    from mii_hcache.tools.budget import Budget
    from mii_hcache.tools.limits import SPLITS
    from mii_hcache.tools.session import Session
    from mii_hcache.tools.ways import SEED, Ways

    session = Session(engine, injection)
    kinds = [ChunkKind(name) for name in options.methods if name != RECOMPUTE]
    best = ChunkKind(default_method(engine.geometry).name)
    cold_kind = best if best in kinds else next(iter(kinds), None)
    started_s = time.perf_counter()
    progress.show("warming up")
    token_s, step_s = session.pace()
    budget = Budget(
        seconds=options.seconds - (time.perf_counter() - started_s),
        num_turns=options.turns,
        num_kinds=len(kinds),
        num_splits=0 if session.is_exact else len(SPLITS),
        max_context_tokens=session.max_context_tokens,
        token_s=token_s,
        step_s=step_s,
    )
    if budget.most_tokens < budget.least_tokens:
        raise ConfigError(
            f"--turns {options.turns} need a context of {budget.least_tokens} tokens before the last turn, the model's "
            f"holds {budget.most_tokens}; take fewer"
        )
    for wanted in sorted(options.history):
        planned, told = budget.choose(wanted, [row.history_tokens for row in report.rows])
        report.notes += [told] if told else []
        if planned is None:
            continue
        round_started_s = time.perf_counter()
        ways = Ways(session, planned, num_turns=options.turns, seed=SEED, tell=progress.show)
        report.rows += ways.rows(kinds, cold_kind, directory / f"history-{planned.history_tokens}")
        budget.learn(planned, time.perf_counter() - round_started_s)


def _load(options: argparse.Namespace, directory: Path) -> HCacheEngine:
    from mii_hcache.engine.config_geometry import read_config
    from mii_hcache.engine.ragged_engine import build_engine

    model = options.model
    if model is None:
        from mii_hcache.engine.demo_model import ensure_demo_model

        model = str(ensure_demo_model(directory))
    block_size = 16
    longest = max(*options.history, least_history_tokens(options.turns)) + MESSAGE_TOKENS + ANSWER_TOKENS + 1
    most = getattr(read_config(model), "max_position_embeddings", None)  # no pool for what the model cannot hold
    longest = min(longest, most) if isinstance(most, int) else longest
    return build_engine(
        model,
        dtype=options.dtype,
        num_blocks=2 * (-(-longest // block_size) + 1) + 32,  # a restored context beside the one it was saved from
        block_size=block_size,
        max_batch_tokens=options.max_batch_tokens,
        max_sequences=4,
    )


@contextlib.contextmanager
def _work_dir(parent: str | None) -> Iterator[Path]:
    """A folder of its own, removed afterwards: no server's state is touched."""
    where = None if parent is None else str(Path(parent).expanduser())
    try:
        if where is not None:
            Path(where).mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix="hcache-selfcheck-", dir=where)
    except OSError as error:
        raise ConfigError(f"--state-dir {parent} cannot be written ({error}); choose one that can") from error
    with folder as name:
        yield Path(name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mii_hcache selfcheck",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", metavar="PATH_OR_HUB_ID", help="checkpoint (default: a small random demo model)")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, default="auto", help="of weights and state (default: auto)")
    parser.add_argument(
        "--history",
        type=_numbers,
        default=[512, 2048],
        metavar="TOKENS[,...]",
        help="length of the conversation before its last turn (default: 512,2048); shortened when time is short",
    )
    parser.add_argument("--turns", type=_at_least(2), default=3, metavar="N", help="turns, two or more (default: 3)")
    parser.add_argument(
        "--methods",
        type=_names,
        default=list(NAMES),
        metavar="NAME[,...]",
        help=f"of {', '.join(NAMES)} (default: all); recompute is always measured, as what others are compared with",
    )
    parser.add_argument(
        "--state-dir",
        metavar="DIR",
        help="where to put the files, in a folder of their own that is removed (default: the system's temporary one)",
    )
    parser.add_argument(
        "--seconds", type=float, default=60.0, metavar="S", help="time to measure for, about (default: 60)"
    )
    parser.add_argument(
        "--max-batch-tokens", type=_at_least(1), default=768, metavar="N", help="as for the server (default: 768)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--inject", metavar="FAULT[@WAY]", help=argparse.SUPPRESS)
    return parser


def _numbers(text: str) -> list[int]:
    numbers = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} are no lengths; write for example 512,2048")
    return numbers


def _names(text: str) -> list[str]:
    names = [part.strip() for part in text.split(",")]
    for name in names:
        if name not in NAMES:
            raise argparse.ArgumentTypeError(f"{name!r} is no method; choose from {', '.join(NAMES)}")
    return names


def _at_least(least: int) -> Any:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} must be a number of {least} or more")
        return int(text)

    return parse
