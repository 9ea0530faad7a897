"""HCache against K and V offload (as in AttentionStore), on this machine's own GPU or CPU.

    python experiments/compare_attentionstore.py
    python experiments/compare_attentionstore.py --model llama2-7b --history 1024,4096 --store memory --record
    python experiments/compare_attentionstore.py --check --table comparison.md

One engine, one store, the same histories. Each method saves a history of random tokens; then all of them, in turn, get
it back behind a new question of 32 tokens, and the time to the first token is taken. Every restore overlaps reading one
layer with computing another, K and V too: what differs is what is read. `kv` is K and V offload, `hcache` the paper's
schedule, `auto` what a server does, both planned from what is measured here first. A ratio above 1 means that HCache is
faster; its 95 % interval comes from drawing turns anew (bootstrap). With `--read-speed` the store is slowed down: such
results are emulated, and say so.

With `--check` the exit status is 1 when a ratio is lower than the one that is recorded for this device, this model,
this length and this store: the upper end of the interval below the recorded ratio less its own noise. Nothing recorded
is no failure; `--record` records.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it can be run as a file

import torch

from experiments.common.checkpoints import SHAPES
from experiments.common.contenders import ask, profile_store
from experiments.common.random_weights import random_engine
from experiments.common.reference import DEFAULT_FILE, Ratio, Reference, median_ratio
from experiments.common.rows import provenance
from mii_hcache.config import HCacheConfig
from mii_hcache.core.cost import LayerCost
from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind
from mii_hcache.core.methods import METHODS
from mii_hcache.engine.measuring import forget_files
from mii_hcache.engine.ragged_engine import HCacheEngine, build_engine
from mii_hcache.engine.service import EngineService
from mii_hcache.runtime.generation import RestoreReport
from mii_hcache.runtime.machine import device_name, software
from mii_hcache.runtime.profiled_tier import ProfiledTier
from mii_hcache.runtime.profiler import TILE_TOKENS
from mii_hcache.storage.base import ChunkStore
from mii_hcache.storage.file import FileStore
from mii_hcache.storage.memory import MemoryStore
from mii_hcache.storage.state_dir import StateDir
from mii_hcache.storage.throttled import ThrottledStore

NAMES = ("kv", "hcache", "auto")
NEW_TOKENS = 32
LEAST_REPEATS = 5


@dataclass(kw_only=True)
class Way:
    """One method on one history."""

    method: str
    stored: str = ""
    """`22H+2KV`."""
    bytes_per_token: float = 0.0
    """That the store holds."""
    ttft_s: list[float] = field(default_factory=list)
    restore_s: list[float] = field(default_factory=list)
    came_back: str = ""
    """`hidden+recompute`; `prefill` when the plan was not to restore."""
    planned_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One history."""

    history_tokens: int
    ways: dict[str, Way]
    ttft: Ratio
    """K and V over HCache."""
    restore: Ratio
    """The same without the new question's prefill."""
    bytes_stored: float | None
    """K and V over HCache; None when its plan stores nothing."""
    auto: Ratio
    """Time to first token, K and V over auto."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A store, and how to make sure that the next read is one."""

    store: ChunkStore
    forget: Callable[[], None]


@contextmanager
def opened_store(kind: str, capacity_bytes: int, read_bytes_per_s: float, folder: str | None) -> Iterator[Opened]:
    """For the time of a `with` block."""
    with ExitStack() as stack:
        forget: Callable[[], None] = lambda: None  # noqa: E731
        store: ChunkStore
        if kind == "memory":
            store = MemoryStore(capacity_bytes)
        else:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hcache-compare-", dir=folder)))
            state_dir = StateDir(path / "state")
            stack.callback(state_dir.close)
            store = FileStore(state_dir, 2 * capacity_bytes)
            forget = lambda: (store.flush(), forget_files(state_dir.path))  # noqa: E731
        if not math.isinf(read_bytes_per_s):
            store = ThrottledStore(store, read_bytes_per_s)
        stack.callback(store.close)
        yield Opened(store=store, forget=forget)


class Arena:
    """Methods on one engine and one store; each has its own chains of spans in it."""

    def __init__(self, engine: HCacheEngine, opened: Opened, costs: Mapping[str, LayerCost]) -> None:
        self._engine = engine
        self._opened = opened
        self._costs = costs

    @contextmanager
    def _service(self, method: str) -> Iterator[EngineService]:
        """Anew for every turn, so that all plan from the profile and none from what the others taught."""
        service = EngineService(
            engine=self._engine,
            store=self._opened.store,
            method=METHODS[method],
            fingerprint=method.encode(),
            config=HCacheConfig(method=method, keep="none"),
            costs=self._costs,
        )
        try:
            yield service
        finally:
            service.close()

    def compare(self, history_tokens: int, repeats: int, tell: Callable[[str], None]) -> Comparison:
        """All methods in turn, `repeats` times."""
        chance = random.Random(history_tokens)
        vocab = min(2000, int(self._engine.model().vocab_size))
        history = chance.choices(range(3, vocab), k=history_tokens)
        ways = {method: self._saved(method, history) for method in NAMES}
        for turn in range(repeats):
            question = chance.choices(range(3, vocab), k=NEW_TOKENS)
            for way in ways.values():
                tell(f"{history_tokens} tokens, turn {turn + 1} of {repeats}, {way.method}")
                self._take_turn(way, [*history, *question])
        kv, hcache, auto = (ways[name] for name in NAMES)
        return Comparison(
            history_tokens=history_tokens,
            ways=ways,
            ttft=median_ratio(kv.ttft_s, hcache.ttft_s),
            restore=median_ratio(kv.restore_s, hcache.restore_s),
            bytes_stored=kv.bytes_per_token / hcache.bytes_per_token if hcache.bytes_per_token else None,
            auto=median_ratio(kv.ttft_s, auto.ttft_s),
        )

    def _saved(self, method: str, history: list[int]) -> Way:
        before = self._opened.store.stats().num_bytes
        with self._service(method) as service:
            storage = service.policy.storage
            ask(service, history)
            service.drain_saves()
        num_bytes = self._opened.store.stats().num_bytes - before
        stored = "-" if storage is None else storage.summary
        return Way(method=method, stored=stored, bytes_per_token=num_bytes / len(history))

    def _take_turn(self, way: Way, prompt: list[int]) -> None:
        """Twice: the first time touches the fresh service's buffers, the second one counts."""
        with self._service(way.method) as service:
            for _ in range(2):
                self._opened.forget()
                report: RestoreReport = ask(service, prompt).report
        assert report.ttft_ms is not None
        way.ttft_s.append(report.ttft_ms / 1e3)
        way.restore_s.append((report.restore_ms if report.restored_tokens else report.ttft_ms) / 1e3)
        way.came_back = report.method or "prefill"
        way.planned_s = None if report.planned_ms is None else report.planned_ms / 1e3


def load(model: str, dtype: str, longest: int) -> HCacheEngine:
    """A shape gets random weights, without any file; anything else is a checkpoint."""
    room = max(longest + NEW_TOKENS + 1, TILE_TOKENS)
    num_blocks = 2 * (-(-room // 16) + 1) + 32
    if model not in SHAPES:
        return build_engine(model, dtype=dtype, num_blocks=num_blocks)
    if dtype == "auto":
        dtype = "float16" if torch.cuda.is_available() else "float32" if model == "demo" else "bfloat16"
    return random_engine(model, dtype=dtype, num_blocks=num_blocks)


def capacity_of(engine: HCacheEngine, histories: Sequence[int]) -> int:
    """Bytes for every method's state of every history, and for the profile's."""
    token_bytes = sum(engine.geometry.bytes_per_token(kind) for kind in ChunkKind)
    return len(NAMES) * (sum(histories) + TILE_TOKENS) * token_bytes + (256 << 20)


def to_table(about: Mapping[str, Any], results: Sequence[Comparison], verdict: str) -> str:
    """Markdown, complete in itself."""
    lines = [
        "# HCache against K and V offload",
        "",
        f"{about['model']}, {about['dtype']}, on {about['device']}; store: {about['store']}. How: **{about['how']}**; "
        f"random tokens, {NEW_TOKENS} new ones behind each history, median of {about['repeats']} turns that the "
        "methods take one after the other; a range is the 95 % interval (bootstrap over turns).",
        "",
        "| history | method | stored | bytes a token | came back as | restore, ms | planned, ms | first token, ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in results:
        for way in one.ways.values():
            planned = "-" if way.planned_s is None else f"{1e3 * way.planned_s:.1f}"
            lines.append(
                f"| {one.history_tokens:,} | {way.method} | {way.stored} | {way.bytes_per_token:,.0f} "
                f"| {way.came_back} | {1e3 * statistics.median(way.restore_s):.1f} | {planned} "
                f"| {1e3 * statistics.median(way.ttft_s):.1f} |"
            )
    lines += ["", "| history | K and V over HCache: first token | restore | bytes (exact) | over auto: first token |"]
    lines.append("|---|---|---|---|---|")
    for one in results:
        stored = "-" if one.bytes_stored is None else f"{one.bytes_stored:.2f}"
        lines.append(f"| {one.history_tokens:,} | {one.ttft} | {one.restore} | {stored} | {one.auto} |")
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    return "\n".join([*lines, "", verdict, "", f"{versions}; commit {about['commit']}; {about['date']}", ""])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    is_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        default="llama2-7b" if is_gpu else "demo",
        help=f"of random weights: {', '.join(SHAPES)}; or a checkpoint's folder (default here: %(default)s)",
    )
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument(
        "--history", default="1024,4096" if is_gpu else "512", help="tokens, comma between (default here: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=9 if is_gpu else LEAST_REPEATS, help="turns, 5 at least")
    parser.add_argument("--store", choices=("memory", "file"), default="memory", help="where state lies")
    parser.add_argument("--state-dir", help="where the files of --store file go (default: the temporary folder)")
    parser.add_argument(
        "--read-speed", type=float, default=math.inf, help="MB/s that reads are slowed down to: emulated"
    )
    parser.add_argument("--reference", type=Path, default=DEFAULT_FILE, help="what --check compares with")
    parser.add_argument("--check", action="store_true", help="exit status 1 when it got slower than recorded")
    parser.add_argument(
        "--record", type=Path, nargs="?", const=DEFAULT_FILE, help="write this device's ratios into a reference file"
    )
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--table", type=Path, help="file for the Markdown table")
    options = parser.parse_args(argv)
    options.histories = [int(text) for text in options.history.split(",")]
    if any(length < SPAN_TOKENS or length % SPAN_TOKENS for length in options.histories):
        parser.error(f"--history must be multiples of {SPAN_TOKENS} above 0, got {options.history}")
    if options.repeats < LEAST_REPEATS:
        parser.error(f"--repeats must be {LEAST_REPEATS} at least, got {options.repeats}")
    if not options.read_speed > 0:
        parser.error(f"--read-speed must be above 0, got {options.read_speed}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 1 when `--check` found it slower than recorded."""
    options = parse(argv)
    is_throttled = not math.isinf(options.read_speed)
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed writes to stdout
        engine = load(options.model, options.dtype, max(options.histories))
        capacity_bytes = capacity_of(engine, options.histories)
        with opened_store(options.store, capacity_bytes, 1e6 * options.read_speed, options.state_dir) as opened:
            arena = Arena(engine, opened, profile_store(engine, ProfiledTier(store=opened.store, forget=opened.forget)))
            results = [
                arena.compare(length, options.repeats, lambda words: print(words, file=sys.stderr))
                for length in options.histories
            ]
    store = f"{options.store} at {options.read_speed:g} MB/s" if is_throttled else options.store
    versions, commit = provenance()
    about = {
        "model": Path(options.model).name,
        "dtype": engine.geometry.dtype,
        "device": device_name(engine.device),
        "store": store,
        "how": "emulated" if is_throttled else "measured",
        "repeats": options.repeats,
        "versions": {**software(), "mii_hcache": versions["mii_hcache"]},
        "commit": commit,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    key = Reference(
        device=about["device"], model=f"{about['model']} {about['dtype']}", store=store, file=options.reference
    )
    found = [key.judge(one.history_tokens, one.ttft) for one in results] if options.check else []
    verdict = " ".join(words for _, words in found)
    table = to_table(about, results, verdict)
    print(table)
    if options.table:
        options.table.write_text(table, encoding="utf-8")
    if options.json:
        body = {**about, "results": [asdict(one) for one in results]}
        options.json.write_text(json.dumps(body, indent=1), encoding="utf-8")
    if options.record:
        for one in results:
            key.record(options.record, one.history_tokens, one.ttft, about)
    return 1 if any(is_slower for is_slower, _ in found) else 0


if __name__ == "__main__":
    sys.exit(main())
