"""What this machine can do at best: every time that is measured later stands beside one of these.

copy         host to device, device to host and both at once, by size, from pinned memory; many pieces one by one,
             batched by the driver, and as one
product      [T, D] x [D, 2 Dkv], the projection of a restore, on the model's own weights
attention    causal, of all heads, over a context that is whole, by torch's fastest
scatter      rotating K and writing K and V into blocks, by each kernel that is there: bytes read and written
placing      a restore's own ways to write a tile: projecting it, and placing K and V in blocks
store        reads of saved state from host memory into pinned memory, by the readers of a restore
both         copying and multiplying at the same time, each over its rate alone
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from experiments.gpu_restore.ledger import Number
from experiments.gpu_restore.rig import Rig
from experiments.gpu_restore.timing import Clock, Sample
from mii_hcache.core.geometry import ChunkKind
from mii_hcache.runtime.buffers import host_empty
from mii_hcache.runtime.streams import Stream, streams_of

LEAST_BYTES = 64 << 20
"""Small copies are made so often that this many bytes go over the link between two clock readings."""
MOST_COPIES = 512
"""But no more often than a queue holds without blocking the caller."""
ROTATED = 4
"""Buffers that take turns, so that no copy finds its source in a cache."""


def _rate(panel: str, series: str, x: float | str, amount: float, sample: Sample, unit: str) -> Iterator[Number]:
    """Median and best of a rate: the time is the host's, with the wait at the end."""
    note = f"{len(sample.host_s)} repetitions; by the device's clock {amount / statistics.median(sample.device_s):.4g}"
    yield Number(panel=panel, series=series, x=x, y=amount / sample.median_s, unit=unit, note=note)
    yield Number(panel=f"{panel}.best", series=series, x=x, y=amount / min(sample.host_s), unit=unit, note=note)


class Copies:
    """Pinned host memory and device memory, several of each."""

    def __init__(self, clock: Clock, num_bytes: int) -> None:
        self.clock = clock
        self._host = [host_empty(num_bytes, dtype=torch.uint8) for _ in range(ROTATED)]
        self._device = [torch.empty(num_bytes, dtype=torch.uint8, device=clock.device) for _ in range(ROTATED)]
        for host, device in zip(self._host, self._device, strict=True):
            device.random_(0, 256)
            host.copy_(device)  # random bytes, not zeros, and every page is there
        self._turns = itertools.cycle(range(ROTATED))
        if clock.is_cuda:
            self._streams = [torch.cuda.Stream(clock.device) for _ in range(2)]  # type: ignore[no-untyped-call]

    def move(self, num_bytes: int, *, is_up: bool, times: int = 1, at_bytes: int = 0) -> None:
        """`times` pieces of so many bytes, one after the other in memory, onto the device or back."""
        turn = next(self._turns)
        host, device = self._host[turn], self._device[turn]
        room = host.numel() // num_bytes
        for idx in range(times):
            start = at_bytes + idx % room * num_bytes
            source, target = (host, device) if is_up else (device, host)
            target[start : start + num_bytes].copy_(source[start : start + num_bytes], non_blocking=True)

    def move_many(self, num_bytes: int, times: int, stream: Stream) -> None:
        """The same onto the device, by the call that restores use: batched where the driver and this build can. The
        pieces are given in an order in which no two of them are neighbours, so that none are joined."""
        turn = next(self._turns)
        host, device = (memory.view(-1, num_bytes) for memory in (self._host[turn], self._device[turn]))
        order = [*range(0, times, 2), *range(1, times, 2)]
        stream.copy_many([(device[idx], host[idx]) for idx in order])

    def on_streams(self, *works: Callable[[], None]) -> None:
        """Each on a stream of its own; the current one goes on behind all of them."""
        if not self.clock.is_cuda:
            for work in works:
                work()
            return
        current = torch.cuda.current_stream(self.clock.device)
        for stream, work in zip(self._streams, works, strict=False):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                work()
        for stream in self._streams[: len(works)]:
            current.wait_stream(stream)


def copies(rig: Rig) -> Iterator[Number]:
    """The link."""
    scale, clock = rig.scale, rig.clock
    largest, whole = max(scale.copy_bytes), scale.many[0] * scale.many[1]
    bench = Copies(clock, -(-max(largest, whole) // whole) * whole)
    for size in scale.copy_bytes:
        times = max(1, min(MOST_COPIES, LEAST_BYTES // size))

        def up(size: int = size, times: int = times) -> None:
            bench.move(size, is_up=True, times=times)

        def down(size: int = size, times: int = times) -> None:
            bench.move(size, is_up=False, times=times)

        found = clock.race(
            {
                "host to device": lambda up=up: bench.on_streams(up),
                "device to host": lambda down=down: bench.on_streams(down),
                "both ways": lambda up=up, down=down: bench.on_streams(up, down),
            },
            scale.repeats,
            flushes=False,
        )
        for name, sample in found.items():
            amount = times * size * (2 if name == "both ways" else 1)
            yield from _rate("copy", name, size, amount, sample, "bytes/s")
    size, count = scale.many
    ways: dict[str, Callable[[], object]] = {
        "one by one": lambda: bench.move(size, is_up=True, times=count),
        "as one": lambda: bench.move(size * count, is_up=True),
    }
    many = streams_of(clock.device).new()
    ways["as the engine does it"] = lambda: bench.move_many(size, count, many)
    for name, sample in clock.race(ways, scale.repeats, flushes=False).items():
        yield from _rate("copies", f"{count} of {size >> 10} KiB, {name}", size, size * count, sample, "bytes/s")


def products(rig: Rig) -> Iterator[Number]:
    """The projection's matrix product alone, without bias, norm or rotation."""
    model, scale = rig.engine.model(), rig.scale
    layers = [layer.qkv_w[rig.geometry.num_heads * rig.geometry.head_size :] for layer in model.layers[:ROTATED]]
    flop_per_token = 4.0 * rig.geometry.hidden_size * rig.geometry.num_kv_heads * rig.geometry.head_size
    for num_tokens in scale.product_tokens:
        rows = torch.randn(num_tokens, rig.geometry.hidden_size, device=rig.engine.device).to(rig.engine.dtype)
        times = max(1, min(32, 16384 // num_tokens))
        weights = itertools.cycle(layers)

        def work(rows: torch.Tensor = rows, times: int = times, weights: Iterator[torch.Tensor] = weights) -> None:
            for _ in range(times):
                F.linear(rows, next(weights))

        with torch.inference_mode():
            sample = rig.clock.sample(work, scale.repeats)
        yield from _rate("product", rig.name, num_tokens, times * num_tokens * flop_per_token, sample, "FLOP/s")


def attention(rig: Rig) -> Iterator[Number]:
    """Causal attention as a prefill has it, dense; counted are the pairs that the mask leaves."""
    geometry, device = rig.geometry, rig.engine.device
    for num_tokens in rig.scale.attention_tokens:
        shape = (1, geometry.num_heads, num_tokens, geometry.head_size)
        q, k, v = (torch.randn(shape, device=device).to(rig.engine.dtype) for _ in range(3))

        def work(q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v) -> None:
            F.scaled_dot_product_attention(q, k, v, is_causal=True)

        with torch.inference_mode():
            sample = rig.clock.sample(work, rig.scale.repeats)
        flop = 2.0 * num_tokens * (num_tokens + 1) * geometry.num_heads * geometry.head_size
        yield from _rate("attention", "torch", num_tokens, flop, sample, "FLOP/s")


def scatter(rig: Rig) -> Iterator[Number]:
    """The step between the product and the blocks, by itself."""
    geometry, engine = rig.geometry, rig.engine
    num_tokens = 2048
    kernels, why_not = scatter_kernels(engine.device)
    for name, reason in why_not.items():
        note = f"not measured: {reason}"
        yield Number(panel="scatter", series=f"{rig.name} {name}", x=num_tokens, y=None, unit="bytes/s", note=note)
    if not kernels:
        return
    from mii_hcache.engine.kernels.rope_scatter import make_tables

    tables = make_tables(engine.model().inv_freq, num_tokens)
    positions = torch.arange(num_tokens, device=engine.device)
    shape = (num_tokens, 2 * geometry.num_kv_heads * geometry.head_size)
    rows = [torch.randn(shape, device=engine.device).to(engine.dtype) for _ in range(ROTATED)]
    cache = torch.empty_like(engine.kv_cache(0)[: -(-num_tokens // engine.block_size)])
    turns = itertools.cycle(rows)

    def work(kernel: Callable[..., object]) -> Callable[[], object]:
        return lambda: kernel(next(turns), cache, positions, positions, tables, query_heads=0)

    found = rig.clock.race({name: work(kernel) for name, kernel in kernels.items()}, rig.scale.repeats)
    for name, sample in found.items():
        yield from _rate("scatter", f"{rig.name} {name}", num_tokens, 2.0 * rows[0].nbytes, sample, "bytes/s")


def scatter_kernels(device: torch.device) -> tuple[dict[str, Callable[..., object]], dict[str, str]]:
    """Those that can run here, by name, and why the others cannot."""
    from mii_hcache.storage import native

    found: dict[str, Callable[..., object]] = {}
    if device.type != "cuda":
        return found, dict.fromkeys(("triton", "cuda"), "needs a GPU")
    why_not: dict[str, str] = {}
    try:
        from mii_hcache.engine.kernels.rope_scatter import rope_scatter

        found["triton"] = rope_scatter
    except ImportError as error:
        why_not["triton"] = str(error)
    why_no_kernels = native.why_no_kernels()
    try:
        if why_no_kernels is None and found:  # the tables of both are Triton's
            from mii_hcache.engine.kernels.cuda_rope_scatter import CudaRopeScatter

            found["cuda"] = CudaRopeScatter(device)
    except OSError as error:
        why_no_kernels = str(error)
    if "cuda" not in found:
        why_not["cuda"] = why_no_kernels or "Triton is missing"
    return found, why_not


def placing(rig: Rig) -> Iterator[Number]:
    """A restore's own two ways to write a tile, as a whole: projecting one (products counted), placing K and V (bytes
    read and written)."""
    engine, geometry = rig.engine, rig.geometry
    num_tokens = min(2048, max(rig.model.contexts))
    uid = rig.new_uid()
    engine.reserve(uid, num_tokens)
    target = engine.target(uid)
    hidden = torch.randn(num_tokens, geometry.hidden_size, device=engine.device).to(engine.dtype)
    kv = torch.randn(num_tokens, 2, geometry.num_kv_heads, geometry.head_size, device=engine.device).to(engine.dtype)
    layers = itertools.cycle(range(geometry.num_layers))
    main = streams_of(engine.device).main
    found = rig.clock.race(
        {
            "project": lambda: target.project_hidden(next(layers), 0, hidden),
            "place": lambda: target.write_kv(next(layers), 0, kv, main),
        },
        rig.scale.repeats,
    )
    flop = 4.0 * num_tokens * geometry.hidden_size * geometry.num_kv_heads * geometry.head_size
    yield from _rate("placing", f"{rig.name} project", num_tokens, flop, found["project"], "FLOP/s")
    yield from _rate("placing", f"{rig.name} place", num_tokens, 2.0 * kv.nbytes, found["place"], "bytes/s")
    engine.evict(uid)


def store_reads(rig: Rig) -> Iterator[Number]:
    """Bytes a second that readers get out of the store: copied and verified, into pinned memory, nothing behind it.
    This, and not the link, may be what bounds a restore from host memory."""
    cost = rig.costs["memory"]
    row_bytes = {kind: rig.geometry.row_bytes(kind) for kind in ChunkKind}
    for kind, seconds in ((ChunkKind.HIDDEN, cost.io_hidden_s), (ChunkKind.KV, cost.io_kv_s)):
        yield Number(
            panel="store",
            series=f"{rig.name} {kind.value}",
            x="memory",
            y=row_bytes[kind] / seconds,
            unit="bytes/s",
            note=f"profiled as restores read; slowed {cost.io_slowdown:.2f} times by projecting beside it, "
            f"projecting {cost.compute_slowdown:.2f} times by reading",
        )


def both(rig: Rig) -> Iterator[Number]:
    """Copying and multiplying at once, on two streams: the share of its own rate that each keeps."""
    if not rig.clock.is_cuda:
        note = "not measured: a CPU has no streams"
        yield Number(panel="both", series=f"{rig.name} copy", x="share kept", y=None, unit="ratio", note=note)
        return
    size = max(rig.scale.copy_bytes)
    bench = Copies(rig.clock, size)
    rows = torch.randn(2048, rig.geometry.hidden_size, device=rig.engine.device).to(rig.engine.dtype)
    weight = rig.engine.model().layers[0].qkv_w[rig.geometry.num_heads * rig.geometry.head_size :]
    flop = 4.0 * 2048 * rig.geometry.hidden_size * rig.geometry.num_kv_heads * rig.geometry.head_size
    ends: dict[str, torch.cuda.Event] = {}

    def note_end(name: str) -> torch.cuda.Event:
        ends[name] = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        ends[name].record()
        return ends[name]

    def copying(times: int) -> None:
        for _ in range(times):
            bench.move(size, is_up=True)
        note_end("copy")

    def multiplying(times: int) -> None:
        for _ in range(times):
            F.linear(rows, weight)
        note_end("product")

    def took_s(*works: Callable[[], None]) -> dict[str, float]:
        ends.clear()
        rig.clock.settle()
        begin = note_end("begin")
        bench.on_streams(*works)
        rig.clock.settle()
        return {name: begin.elapsed_time(end) / 1e3 for name, end in ends.items() if end is not begin}

    with torch.inference_mode():
        for _ in range(2):
            copy_s = took_s(lambda: copying(4), lambda: None)["copy"] / 4
            product_s = took_s(lambda: None, lambda: multiplying(64))["product"] / 64
        # Of equal length, and the ends of both are looked at: the longer one runs alone at its end, at most by a few %.
        num_copies = 8
        num_products = max(1, round(num_copies * copy_s / product_s))
        found = [took_s(lambda: copying(num_copies), lambda: multiplying(num_products)) for _ in range(5)]
    best = min(found, key=lambda one: max(one.values()))
    pairs = (("copy", num_copies * copy_s, size / copy_s), ("product", num_products * product_s, flop / product_s))
    for name, alone_s, rate in pairs:
        note = f"alone {rate:.4g} a second; {num_copies} copies of {size >> 20} MiB beside {num_products} products"
        yield Number(
            panel="both", series=f"{rig.name} {name}", x="share kept", y=alone_s / best[name], unit="ratio", note=note
        )
