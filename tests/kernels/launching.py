"""Launches our kernels on a driver that only writes down what it is to launch: Triton's first launch of a kind beside
the ones that follow. For `test_launch.py`, in a process of its own: not with TRITON_INTERPRET=1.

    python -m tests.kernels.launching          a line of JSON for each thing seen
"""

from __future__ import annotations

import json
import logging
import time
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from mii_hcache.engine.kernels import gate, head_norm, norm, paged_attention, rope_scatter, split_merge
from mii_hcache.engine.kernels.launch import Launcher
from mii_hcache.engine.kernels.work import plan_work, tile_shapes

HEADS, HEAD, TOKENS = 4, 64, 3
WIDTH = HEADS * HEAD
DTYPE = torch.bfloat16


class Launches:
    """Triton's `CudaLauncher`, without CUDA."""

    made: ClassVar[list[tuple[Any, ...]]] = []
    """Grid, stream, function and arguments of each, addresses in the place of tensors."""
    is_changed = False

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(
        self,
        x: int,
        y: int,
        z: int,
        stream: int,
        function: Any,
        packed: Any,
        about: Any,
        enter: Any,
        leave: Any,
        *args: Any,
    ) -> None:
        if self.is_changed and about is None:
            raise TypeError("another launch is wanted")
        assert packed is not None
        values = [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args]
        self.made.append(((x, y, z), stream, function, values))


class _Utils:
    def load_binary(self, name: str, *others: Any) -> tuple[Any, ...]:
        return object(), f"{name}/{zlib.crc32(others[0])}", 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10}


class _Driver:
    utils = _Utils()
    launcher_cls = Launches
    stream = 7

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def empty(*shape: int, dtype: torch.dtype = DTYPE, shift: int = 0) -> torch.Tensor:
    """`shift`: elements behind an address that is a multiple of 64."""
    total = 1
    for size in shape:
        total *= size
    memory = torch.zeros(total + 128, dtype=dtype)
    start = (-memory.data_ptr() % 64) // memory.itemsize + shift
    return memory[start : start + total].view(shape)


def fronts() -> dict[str, Callable[[int], Any]]:
    """Each kernel's front, with new tensors at each call: of so many tokens."""
    narrow, wide = tile_shapes(group=1, head_size=HEAD, element_bytes=2)
    tables = empty(64, HEAD // 2, dtype=torch.float32), empty(64, HEAD // 2, dtype=torch.float32)

    def add(tokens: int, hidden: bool = True) -> None:
        other = empty(tokens, WIDTH) if hidden else None
        norm.add_norm(empty(tokens, WIDTH), other, empty(WIDTH), None, empty(tokens, WIDTH), eps=1e-5, is_rms=True)

    def rope(tokens: int, query_heads: int) -> None:
        rows = empty(tokens, (query_heads + 2 * HEADS) * HEAD)
        at = empty(tokens, dtype=torch.int64, shift=1)  # whose alignment is not specialised for
        rope_scatter.rope_scatter(rows, empty(8, 16, 2, HEADS, HEAD), at, at, tables, query_heads=query_heads)

    def attend(tokens: int, merged: bool) -> None:
        works = plan_work(
            [(idx, 1, 1000) for idx in range(tokens)], narrow=narrow, wide=wide, group=1, num_kv_heads=HEADS,
            num_programs=64, window=None,
        )  # fmt: skip
        items, merges = (
            empty(*works[0].items.shape, dtype=torch.int32),
            empty(*works[0].merges.shape, dtype=torch.int32),
        )
        partials = empty(works[0].num_partials, HEADS, narrow.rows, HEAD, dtype=torch.float32)
        sums = empty(works[0].num_partials, HEADS, narrow.rows, dtype=torch.float32)
        out = empty(tokens, WIDTH)
        if merged:
            split_merge.merge_splits(merges, partials, sums, out, group=1)
            return
        block_tables = empty(tokens, 64 + tokens, dtype=torch.int32)
        paged_attention.attend_tiles(
            empty(tokens, 3 * WIDTH), empty(80, 16, 2, HEADS, HEAD), block_tables, items, out, partials, sums,
            shape=narrow, group=1, scale=0.125,
        )  # fmt: skip

    return {
        "add_norm": add,
        "norm": lambda tokens: add(tokens, False),
        "silu_mul": lambda tokens: gate.silu_mul(empty(tokens, 2 * WIDTH)),
        "head_norm": lambda tokens: head_norm.norm_heads(
            empty(tokens, 3 * WIDTH), empty(HEAD), empty(HEAD), kv_heads=HEADS, eps=1e-6
        ),
        "rope_scatter": lambda tokens: rope(tokens, HEADS),
        "restored": lambda tokens: rope(tokens, 0),
        "attend": lambda tokens: attend(tokens, False),
        "merge": lambda tokens: attend(tokens, True),
    }


class Looks:
    """How often Triton looked at arguments."""

    def __init__(self, *kernels: Any) -> None:
        self._num = 0
        for kernel in kernels:
            kernel.add_pre_run_hook(self._count)

    def _count(self, *args: Any, **settings: Any) -> None:
        self._num += 1

    def at(self, call: Callable[[], Any]) -> tuple[int, int]:
        """Launches of a call, and Triton's looks."""
        launched, looked = len(Launches.made), self._num
        call()
        return len(Launches.made) - launched, self._num - looked


def tell(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    driver.set_active(_Driver())
    looks = Looks(
        norm.add_norm_kernel,
        gate.silu_mul_kernel,
        head_norm.head_norm_kernel,
        rope_scatter.rope_scatter_kernel,
        paged_attention.paged_attention_kernel,
        split_merge.split_merge_kernel,
    )
    for name, front in fronts().items():
        first, again = looks.at(partial(front, TOKENS)), looks.at(partial(front, TOKENS + 6))
        of_triton, ours = Launches.made[-2:]
        is_alike = of_triton[1:3] == ours[1:3] and len(of_triton[3]) == len(ours[3])
        tell(what="front", name=name, first=first, again=again, is_alike=is_alike, grid=ours[0])

    product, out = empty(TOKENS, 2 * WIDTH), empty(TOKENS, WIDTH)
    launch = Launcher(gate.silu_mul_kernel, {"COLUMNS": gate.COLUMNS}, num_warps=4)

    def once(product: torch.Tensor = product, out: torch.Tensor = out, width: int = WIDTH) -> None:
        launch((TOKENS, 1, 1), product, out, width)

    once()
    once()
    launch._launch((TOKENS, 1, 1), product, out, WIDTH)
    tell(what="arguments", is_same=Launches.made[-1] == Launches.made[-2])
    for name, call in {
        "as before": once,
        "misaligned": lambda: once(empty(TOKENS, 2 * WIDTH, shift=1)),
        "misaligned again": lambda: once(empty(TOKENS, 2 * WIDTH, shift=1)),
        "another integer": lambda: once(width=WIDTH - 1),
        "another dtype": lambda: once(product.half(), out.half()),
        "as at first": once,
    }.items():
        num, looked = looks.at(call)
        tell(what="kind", name=name, num=num, looked=looked, function=Launches.made[-1][2])
    _Driver.stream = 9
    once()
    tell(what="stream", stream=Launches.made[-1][1])

    hook: Callable[[Any], None] = [].append
    triton.knobs.runtime.launch_enter_hook.add(hook)
    tell(what="profiler", at=looks.at(once))
    triton.knobs.runtime.launch_enter_hook.remove(hook)
    tell(what="no profiler", at=looks.at(once))
    ours_us, triton_us = cpu_us(once, lambda: launch._launch((TOKENS, 1, 1), product, out, WIDTH))
    tell(what="speed", note="Python alone, nothing is launched", us=ours_us, triton_us=triton_us)

    Launches.is_changed = True
    tell(what="changed", at=[looks.at(once) for _ in range(3)])


def cpu_us(*calls: Callable[[], Any]) -> list[float]:
    """The least of several of each, by turns: others who share the core slow all of them alike."""
    times_s: list[list[float]] = [[] for _ in calls]
    for _ in range(20):
        for call, own_s in zip(calls, times_s, strict=True):
            started_s = time.thread_time()
            for _ in range(50):
                call()
            own_s.append(time.thread_time() - started_s)
    return [round(2e4 * min(own_s), 2) for own_s in times_s]


if __name__ == "__main__":
    main()
