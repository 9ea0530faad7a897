"""the tiny engine over a disk that fails and is damaged: its answers are those of one that never left."""

from __future__ import annotations

import atexit
import errno
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from tests.crash.case import Case, Unavailable
from tests.crash.damage import damage
from tests.crash.verify import WrongBytes

_NUM_TOKENS = 8


def run(case: Case) -> None:
    """Save under faults, restore under faults, damage the files, restore again; every answer is compared."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise Unavailable(str(error)) from None
    if case.num_paths > 1:
        raise Unavailable("faults and damage are for one directory here; tests/engine/test_stripes.py has two")
    rng = case.rng
    paths = [case.root / f"state{idx}" for idx in range(case.num_paths)]
    method, dram_bytes = rng.choice(["hidden", "kv"]), rng.choice([0, 1 << 20])
    for life in range(2):
        with _running(case, paths, method, dram_bytes) as (client, state):
            with _faults(case, state):
                _ask_all(case, client, rng)
            _ask_all(case, client, rng)
        if life == 0:
            shutil.copytree(paths[0], case.root / "old")
            for path in paths:
                done = [damage(path, case.root / "old", case.root / "old", rng) for _ in range(2)]
                case.counts["damaged"] += len(done)


def _ask_all(case: Case, client: Any, rng: random.Random) -> None:
    for idx in rng.sample(range(3), 3):
        prompt = [*_prompts()[idx], 7, 8, 9]
        result = client.ask(prompt, _NUM_TOKENS)
        if result.token_ids != _expected()[idx]:
            raise WrongBytes(f"prompt {idx} is answered {result.token_ids}, not {_expected()[idx]}: {result.report}")
        case.counts["generations compared"] += 1
        case.counts["tokens restored"] += result.report.restored_tokens


@contextmanager
def _faults(case: Case, state: Any) -> Iterator[None]:
    """Reads and writes that fail or are short, now and then."""
    from pytest import MonkeyPatch

    from mii_hcache.storage.file import FileStore
    from tests.storage.faults import inject

    rng = random.Random(case.rng.getrandbits(32))
    file = state.store if isinstance(state.store, FileStore) else getattr(state.store, "_file", None)
    if not isinstance(file, FileStore):  # several of them
        yield
        return
    share = rng.choice([0.01, 0.1, 0.4])

    def fault(is_write: bool, offset: int, num_bytes: int) -> int | None:
        if rng.random() >= share:
            return None
        case.counts["faults"] += 1
        return rng.choice([-errno.EIO, max(1, num_bytes // 2)])

    patch = MonkeyPatch()
    try:
        inject(patch, file, fault)
        yield
    finally:
        patch.undo()


@contextmanager
def _running(case: Case, paths: list[Path], method: str, dram_bytes: int) -> Iterator[tuple[Any, Any]]:
    from mii_hcache.storage.open import open_state
    from tests.engine_kit import open_client, poisoned_engine

    where: Any = paths[0] if len(paths) == 1 else paths
    state = open_state(where, 256 << 20, dram_bytes, io=case.io)
    engine = poisoned_engine(_model(), num_blocks=200, max_batch_tokens=256)
    client = open_client(engine, store=state.store, method=method, keep="none")
    try:
        yield client, state
    finally:
        client.service.close()
        state.close()


@cache
def _model() -> Path:
    """A seeded checkpoint, for this process."""
    from tests.engine_kit import save_tiny_model

    home = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    save_tiny_model("llama-gqa", home)
    return home


@cache
def _prompts() -> list[list[int]]:
    return [random.Random(seed).choices(range(3, 1000), k=length) for seed, length in enumerate((130, 200, 330))]


@cache
def _expected() -> list[tuple[int, ...]]:
    """What an engine answers that saves and restores nothing."""
    from tests.engine_kit import open_client, poisoned_engine

    client = open_client(poisoned_engine(_model(), num_blocks=200), method="recompute", keep="none")
    told = [client.ask([*prompt, 7, 8, 9], _NUM_TOKENS).token_ids for prompt in _prompts()]
    client.service.close()
    return told
