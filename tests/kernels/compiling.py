"""Compile our Triton kernels for GPUs that are not here: to machine code, by the assembler that comes with Triton.

    python -m tests.kernels.compiling          each kernel and dtype for each GPU, in a model's usual shape (a minute)
    python -m tests.kernels.compiling --all    all head sizes and kinds of attention as well (a quarter of an hour)

Prints a line of JSON for each: kernel, GPU, shared memory, registers, bytes of stack. Not with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mii_hcache.engine.kernels import gate, norm, paged_attention, rope_scatter, split_merge
from mii_hcache.engine.kernels.work import tile_shapes

SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Most shared memory of a program by compute capability: A100, RTX 4090 and L40, H100 and H200, B200, RTX 50."""
POINTERS = {
    "positions": "*i64",
    "slots": "*i64",
    "tables": "*i32",
    "items": "*i32",
    "merges": "*i32",
    "partials": "*fp32",
    "log_sums": "*fp32",
    "cos": "*fp32",
    "sin": "*fp32",
}
SCALARS = {"eps": "fp32", "scale": "fp32", "softcap": "fp32"}
TENSORS = {"rows", "cache", "out", "gamma", "beta", "residual", "hidden", "product"}
"""In the model's dtype. What is left are 32-bit integers."""
_ASYNC_COPY = r"cp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[[^\]]*\], (0x\w+|\d+)"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel as it is launched."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 3


def attention_cases(dtype: torch.dtype, group: int, head_size: int, **kinds: bool) -> Iterator[Case]:
    """Both tiles of attention, and their merge."""
    shapes = tile_shapes(group=group, head_size=head_size, element_bytes=dtype.itemsize)
    for tile, shape in zip(("narrow", "wide"), shapes, strict=True):
        sizes = {"kv_heads": 8, "group": group, "head_size": head_size}
        words = [f"group={group}", f"head={head_size}", *(kind for kind, is_on in kinds.items() if is_on)]
        yield Case(
            name=f"attention {tile} {' '.join(words)}",
            kernel=paged_attention.paged_attention_kernel,
            constants=paged_attention.constants(shape, **sizes, block_size=64, dtype=dtype, **kinds),
            num_warps=shape.num_warps,
            num_stages=shape.num_stages,
        )
        yield Case(
            name=f"merge {tile} {' '.join(words)}",
            kernel=split_merge.split_merge_kernel,
            constants=split_merge.constants(**sizes, rows=shape.rows),
            num_warps=split_merge.NUM_WARPS,
        )


def small_cases() -> Iterator[Case]:
    """The kernels that multiply nothing."""
    for query_heads, rotary_dim, has_norm in ((32, 128, False), (0, 128, False), (0, 128, True), (32, 0, False)):
        yield Case(
            name=f"rope_scatter queries={query_heads} rotary={rotary_dim} norm={has_norm}",
            kernel=rope_scatter.rope_scatter_kernel,
            constants=rope_scatter.constants(
                query_heads=query_heads, kv_heads=8, head_size=128, rotary_dim=rotary_dim, has_norm=has_norm
            ),
            num_warps=rope_scatter.NUM_WARPS,
        )
    for is_rms in (True, False):
        yield Case(
            name=f"add_norm rms={is_rms}",
            kernel=norm.add_norm_kernel,
            constants={"COLUMNS": 8192, "HAS_HIDDEN": True, "IS_RMS": is_rms},
            num_warps=norm.num_warps_for(8192),
        )
    yield Case(
        name="silu_mul",
        kernel=gate.silu_mul_kernel,
        constants={"COLUMNS": gate.COLUMNS},
        num_warps=gate.NUM_WARPS,
    )


def compile_case(case: Case, dtype: torch.dtype, capability: int) -> dict[str, Any]:
    """Compile, and read from the machine code what it takes."""
    element = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    signature, attrs = {}, {}
    for place, name in enumerate(case.kernel.arg_names):
        if name in case.constants:
            signature[name] = "constexpr"
            continue
        signature[name] = f"*{element}" if name in TENSORS else {**POINTERS, **SCALARS}.get(name, "i32")
        if signature[name].startswith("*") or name in ("row_stride", "num_columns"):
            attrs[(place,)] = [["tt.divisibility", 16]]  # as torch's memory and models' sizes are
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=case.constants, attrs=attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    used = _resources(compiled.asm["cubin"])
    return {
        "kernel": case.name,
        "dtype": element,
        "sm": capability,
        "shared_bytes": compiled.metadata.shared,
        "shared_limit_bytes": SHARED_BYTES[capability],
        "registers": int(used["REG"]),
        "stack_bytes": int(used["STACK"]),
        "local_bytes": int(used["LOCAL"]),
        "products": sorted(set(re.findall(r"wgmma|tcgen05\.mma|mma\.sync", compiled.asm["ptx"]))),
        "async_copy_bytes": sorted({int(size, 0) for size in re.findall(_ASYNC_COPY, compiled.asm["ptx"])}),
    }


def _resources(cubin: bytes) -> dict[str, str]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))


def usual() -> Iterator[tuple[Case, torch.dtype, int]]:
    """Every kernel, dtype and GPU; the slow ones (attention) of both tiles once for each GPU."""
    for capability, dtype in zip((80, 89, 90, 100), (torch.bfloat16, torch.float16) * 2, strict=True):
        for case in attention_cases(dtype, 4, 128):
            yield case, dtype, capability
    for dtype in (torch.float16, torch.bfloat16):
        for capability in (80, 89, 90, 100):
            for case in small_cases():
                yield case, dtype, capability


def everything() -> Iterator[tuple[Case, torch.dtype, int]]:
    """All of it."""
    for capability in SHARED_BYTES:
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for case in small_cases():
                yield case, dtype, capability
            for group, head_size in ((1, 64), (1, 80), (1, 96), (1, 128), (4, 128), (7, 128), (1, 256)):
                for case in attention_cases(dtype, group, head_size):
                    yield case, dtype, capability
            for kinds in ({"has_window": True}, {"has_softcap": True}):
                for case in attention_cases(dtype, 4, 128, **kinds):
                    yield case, dtype, capability


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="all head sizes and kinds of attention as well")
    parser.add_argument("--only", type=int, help="for this compute capability only, such as 89")
    options = parser.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET=1: nothing is compiled")
    for case, dtype, capability in everything() if options.all else usual():
        if options.only in (None, capability):
            print(json.dumps(compile_case(case, dtype, capability)), flush=True)


if __name__ == "__main__":
    main()
