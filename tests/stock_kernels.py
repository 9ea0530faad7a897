"""Stand-ins for DeepSpeed's compiled extensions: functions with the signatures of its C++ bindings, on the CPU.

Each computes what the CUDA kernel of deepspeed 0.19.8 computes, with its roundings: into the tensors that it is given,
from the raw addresses that it is given. Arguments are checked against the declarations in the installed headers. Each
refuses what the binding refuses, and also what the kernel would take
without a word and turn into other people's memory: strides that it assumes, rows that are not aligned to its 16-byte
loads, shapes for which nothing is launched.

Sums are taken in float64 and rounded where the kernels round, so that a row does not depend on what it is computed
together with: what differs between two ways to split a batch, or between serving and restoring, is a mistake.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

VECTOR_BYTES = 16
PLACED_HEAD_SIZES = (64, 80, 96, 128)
COPIED_GROUPS = (1, 2, 4, 5, 8)
ROTATED_GROUPS = (1, 2, 4, 5, 6, 7, 8, 16, 29, 35, 36, 71)
SIXTEEN_BIT = (torch.float16, torch.bfloat16)


def check(condition: bool, message: str) -> None:
    """As TORCH_CHECK."""
    if not condition:
        raise RuntimeError(message)


def _check_rows(*tensors: torch.Tensor) -> None:
    """What a kernel with vector loads takes for granted of rows: contiguous channels, aligned starts."""
    for tensor in tensors:
        check(tensor.stride(-1) == 1, "channels are not contiguous")
        check(tensor.data_ptr() % VECTOR_BYTES == 0, "rows do not start at a vector")
        check(tensor.stride(0) * tensor.element_size() % VECTOR_BYTES == 0, "rows are not aligned to vectors")


def _check_dense(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        check(tensor.is_contiguous(), "the kernel computes addresses from sizes: tensors must be contiguous")


def _int32_at(address: int, idx: int) -> int:
    return ctypes.c_int32.from_address(address + 4 * idx).value


def _check_batch(
    metadata: torch.Tensor, sequences: torch.Tensor, row_sequences: torch.Tensor, lists: torch.Tensor, num_rows: int
) -> None:
    check(metadata.dtype == torch.int32 and metadata.numel() >= 2, "batch_metadata must be two int32")
    check(sequences.dtype == torch.int32 and sequences.shape[1] == 4, "seq_metadata must be [n, 4] int32")
    check(row_sequences.dtype == torch.int32, "expected scalar type Int")
    check(lists.dtype == torch.int64, "kv_ptrs must hold addresses")
    _check_dense(metadata, sequences, row_sequences, lists)
    check(int(metadata[0]) == num_rows, "the batch has another number of tokens than the tensors")
    check(row_sequences.numel() >= num_rows and sequences.shape[0] >= int(metadata[1]), "the batch is cut short")


def _positions(sequences: torch.Tensor, row_sequences: torch.Tensor, num_rows: int) -> torch.Tensor:
    of_row = sequences[row_sequences[:num_rows].long()]
    return of_row[:, 2] + (torch.arange(num_rows, dtype=torch.int32) - of_row[:, 0])


def build_atoms(
    atoms: torch.Tensor,
    metadata: torch.Tensor,
    sequences: torch.Tensor,
    lists: torch.Tensor,
    q_block_size: int,
    kv_block_size: int,
) -> int:
    check(atoms.device.type == "cpu" and atoms.dtype == torch.int32, "atoms are int32 on the host")
    count = 0
    for idx in range(int(metadata[1])):
        start, left, seen, _ = sequences[idx].tolist()
        while left > 0:
            check(count < atoms.shape[0], "atoms are written behind the end of their buffer")
            length = min(left, q_block_size)
            extent = seen + length
            address = int(lists[idx])
            atoms[count, :2] = torch.tensor([address]).view(torch.int32)
            atoms[count, 2:7] = torch.tensor([start, length, -(-extent // kv_block_size), extent, seen])
            start, seen, left, count = start + length, seen + length, left - length, count + 1
    return count


def flash_attn_by_atoms(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    atoms: torch.Tensor,
    softmax_scale: float,
    is_causal: bool,
) -> None:
    check(q.dtype in SIXTEEN_BIT, "FlashAttention only support fp16 and bf16 data type")
    check(k.dtype == q.dtype == v.dtype == out.dtype, "query and key must have the same dtype")
    check(q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, "Input tensor must have contiguous last dimension")
    num_blocks, block_size, num_kv_heads, head_size = k.shape
    num_heads = q.shape[1] // head_size
    check(num_heads % num_kv_heads == 0, "num_heads_q must be divisible by num_heads_kv")
    check(block_size == (128 if head_size <= 64 else 64), "the kernel was compiled for another block size")
    check(k.stride() == v.stride() and k.stride(2) == head_size, "heads are not contiguous")
    check(k.stride(0) == block_size * k.stride(1), "blocks are not contiguous")
    _check_rows(q, out)
    group = num_heads // num_kv_heads
    out.fill_(float("nan"))  # only the atoms' rows are written
    for atom in atoms:
        address = int(atom[:2].clone().view(torch.int64))
        start, length, blocks, extent, seen = atom[2:7].tolist()
        ids = [_int32_at(address, idx) for idx in range(blocks)]
        check(all(0 <= block < num_blocks for block in ids), f"blocks {ids} of {num_blocks}")
        keys, values = (x[ids].flatten(0, 1)[:extent].double().repeat_interleave(group, 1) for x in (k, v))
        queries = q[start : start + length].unflatten(-1, (num_heads, head_size)).double()
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * softmax_scale
        if is_causal:
            at = torch.arange(seen, seen + length)
            scores.masked_fill_(torch.arange(extent)[None] > at[:, None], float("-inf"))
        attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
        out[start : start + length] = attended.flatten(1).to(out.dtype)


def _place(
    kv_cache: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    inv_freq: torch.Tensor | None,
    batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    groups: tuple[int, ...],
) -> None:
    num_rows = q.shape[0]
    check(num_rows == k.shape[0] == v.shape[0], "n_tokens differ")
    check(q.stride(0) == k.stride(0) == v.stride(0), "k and v are read with the stride of q")
    num_blocks, block_size, _, num_kv_heads, head_size = kv_cache.shape
    num_heads = q.shape[1] // head_size
    check(num_heads % num_kv_heads == 0 and num_heads // num_kv_heads in groups, "no kernel for this number of heads")
    check(head_size in PLACED_HEAD_SIZES, "no kernel for this head size")
    check(q.dtype in SIXTEEN_BIT and q.dtype == kv_cache.dtype == k.dtype == v.dtype, "no kernel for this dtype")
    row = num_kv_heads * head_size
    check(kv_cache.stride()[1:3] == (2 * row, row), "rows are found by the strides of a token and of K against V")
    check(kv_cache.is_contiguous(), "blocks are not contiguous")
    check(kv_cache[:, :, 0].numel() * 2 < 2**31, "offsets are counted in 32 bits")
    _check_rows(q, k, v)
    _check_batch(*batch, num_rows)
    _, sequences, row_sequences, lists = batch
    positions = _positions(sequences, row_sequences, num_rows)
    addresses = lists[row_sequences[:num_rows].long()].tolist()
    # Loaded before anything is stored, as each thread does.
    new_q, new_k = (x.unflatten(-1, (-1, head_size)).clone() for x in (q, k))
    if inv_freq is not None:
        new_q, new_k = _rotated(new_q, positions, inv_freq), _rotated(new_k, positions, inv_freq)
    values = v.unflatten(-1, (-1, head_size)).clone()
    for row, position in enumerate(positions.tolist()):
        block = _int32_at(addresses[row], position // block_size)
        check(0 <= block < num_blocks, f"block {block} of {num_blocks}")
        kv_cache[block, position % block_size, 0] = new_k[row]
        kv_cache[block, position % block_size, 1] = values[row]
    if inv_freq is not None:
        q.copy_(new_q.flatten(1))


def _rotated(x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    half = inv_freq.numel()
    check(half * x.element_size() % VECTOR_BYTES == 0, "halves of a head are exchanged by whole vectors")
    check(2 * half <= x.shape[-1], "more is rotated than a head has")
    angle = (inv_freq[None] * positions.float()[:, None])[:, None]
    low, high = x[..., :half].float(), x[..., half : 2 * half].float()
    turned = x.clone()
    turned[..., :half] = (low * angle.cos() + -high * angle.sin()).to(x.dtype)
    turned[..., half : 2 * half] = (high * angle.cos() + low * angle.sin()).to(x.dtype)
    return turned


def kv_trained_rotary_embeddings(kv_cache: Any, q: Any, k: Any, v: Any, inv_freq: torch.Tensor, *batch: Any) -> None:
    check(inv_freq.dtype == torch.float32, "trained rotary inverse frequencies must be FP32")
    check(inv_freq.dim() == 1, "trained rotary inverse frequencies must be one-dimensional")
    check(inv_freq.is_contiguous(), "trained rotary inverse frequencies must be contiguous")
    _place(kv_cache, q, k, v, inv_freq, batch, ROTATED_GROUPS)


def kv_rotary_embeddings(*_: Any) -> None:
    raise AssertionError("the kernel that truncates frequencies must never be called")


def linear_kv_copy(kv_cache: Any, q: Any, k: Any, v: Any, *batch: Any) -> None:
    _place(kv_cache, q, k, v, None, batch, COPIED_GROUPS)


def ragged_embed(
    out: torch.Tensor,
    token_ids: torch.Tensor,
    table: torch.Tensor,
    position_table: torch.Tensor | None,
    position_offset: int,
    *batch: torch.Tensor,
) -> None:
    num_rows = token_ids.numel()
    check(token_ids.dtype in (torch.int32, torch.int64), "Unsupported dispatch type")
    _check_batch(*batch, num_rows)
    _check_dense(out, token_ids, table)
    _check_rows(out, table)
    is_known = (token_ids >= 0) & (token_ids < table.shape[0])
    rows = table[token_ids.long().clamp(0, table.shape[0] - 1)]
    if position_table is not None:
        check(
            position_table.dtype == table.dtype, "position_embedding_weight and embedding_weight must be of one dtype"
        )
        _check_dense(position_table)
        at = (_positions(batch[1], batch[2], num_rows) + position_offset).clamp(0, position_table.shape[0] - 1)
        rows = rows + position_table[at.long()]
    out[is_known] = rows[is_known]


def _check_norm(*tensors: torch.Tensor) -> None:
    channels = tensors[0].shape[-1]
    check(128 < channels <= 16384, "for so many channels nothing is launched, or rows behind the last are written")
    check(len({tensor.dtype for tensor in tensors}) == 1, "tensors should have the same data type")
    check(len({tensor.shape for tensor in tensors if tensor.dim() == 2}) == 1, "tensors should have the same shape")
    _check_dense(*tensors)


def rms_norm(out: torch.Tensor, x: torch.Tensor, gamma: torch.Tensor, epsilon: float) -> None:
    _check_norm(out, x, gamma)
    scale = torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + epsilon).to(x.dtype)
    out.copy_(x * scale * gamma)


def rms_pre_norm(
    out: torch.Tensor,
    residual_out: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor,
    gamma: torch.Tensor,
    epsilon: float,
) -> None:
    _check_norm(out, residual_out, x, residual, gamma)
    residual_out.copy_(x + residual)
    rms_norm(out, residual_out, gamma, epsilon)


def layer_norm(out: torch.Tensor, x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, epsilon: float) -> None:
    _check_norm(out, x, gamma, beta)
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True)
    scaled = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + epsilon)
    out.copy_((scaled * gamma.double() + beta.double()).to(x.dtype))


def pre_layer_norm(
    residual_out: torch.Tensor,
    out: torch.Tensor,
    residual: torch.Tensor,
    x: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    epsilon: float,
) -> None:
    _check_norm(out, residual_out, x, residual, gamma, beta)
    residual_out.copy_(x + residual)
    layer_norm(out, residual_out, gamma, beta, epsilon)


def blas_linear(out: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> None:
    check(out.dtype == x.dtype == w.dtype, "Output and weights must have the same scalar type")
    check(x.shape[1] == w.shape[1] and out.shape == (x.shape[0], w.shape[0]), "sizes are taken from out and w")
    _check_dense(out, x, w)
    out.copy_(x.double() @ w.double().T)


ACTIVATIONS = {
    0: lambda x: F.gelu(x, approximate="tanh"),
    1: F.relu,
    2: F.silu,
    3: lambda x: F.gelu(x, approximate="tanh"),
    4: F.relu,
    5: F.silu,
    6: lambda x: x,
}
"""By the numbers of the C++ `ActivationType`."""


def bias_activation(x: torch.Tensor, bias: torch.Tensor | None, act_type: int) -> None:
    check(act_type in (0, 1, 2, 6), "Unsupported activation type for BiasActivation")
    check(x.dim() == 2 and x.dtype in SIXTEEN_BIT, "BiasActivation only supports 2D activation tensors of 16 bits")
    check(x.shape[1] % 8 == 0, "a vector of channels crosses into the next row")
    check(bias is None or bias.dtype == x.dtype, "BiasActivation activation and bias must have same dtype")
    _check_dense(x)
    wide = x.float() if bias is None else x.float() + bias.float()
    x.copy_(ACTIVATIONS[act_type](wide).to(x.dtype))


def gated_activation(out: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, act_type: int) -> None:
    check(act_type in (3, 4, 5), "Unsupported activation type")
    check(bias is None or (bias.dtype == x.dtype and bias.numel() == x.shape[1]), "Bias must match the input")
    check(out.shape == (x.shape[0], x.shape[1] // 2), "the output has half of the input's channels")
    check(x.shape[1] % 8 == 0 and x.shape[1] <= 7 * 8192, "Called with more columns than supported")
    _check_dense(out, x)
    wide = x.float() if bias is None else x.float() + bias.float()
    out.copy_((ACTIVATIONS[act_type](wide[:, 0::2]) * wide[:, 1::2]).to(out.dtype))


def linear(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear` without rounding by shape."""
    product = x.double() @ w.double().T
    return (product if bias is None else product + bias.double()).to(x.dtype)


CORE = (
    rms_norm,
    rms_pre_norm,
    layer_norm,
    pre_layer_norm,
    blas_linear,
    bias_activation,
    gated_activation,
)
RAGGED = (
    build_atoms,
    flash_attn_by_atoms,
    kv_trained_rotary_embeddings,
    kv_rotary_embeddings,
    linear_kv_copy,
    ragged_embed,
)


def signatures() -> dict[str, list[str]]:
    """Argument types of what DeepSpeed's extensions bind, by the name in Python, read from the installed sources."""
    root = Path(importlib.util.find_spec("deepspeed").submodule_search_locations[0]) / "inference/v2/kernels"
    bound: dict[str, str] = {}
    for name in ("core_ops/core_ops.cpp", "ragged_ops/ragged_ops.cpp"):
        bound |= {cpp: python for python, cpp in re.findall(r'm\.def\(\s*"(\w+)",\s*&(\w+)', (root / name).read_text())}
    found = {}
    declaration = re.compile(r"^(?:void|int32_t) (\w+)\(([^()]*)\)\s*[;{]", re.MULTILINE)
    for header in (*root.glob("core_ops/**/*.h"), *root.glob("ragged_ops/**/*.h")):
        for cpp, arguments in declaration.findall(header.read_text()):
            if cpp in bound:
                given = (argument.strip() for argument in arguments.split(","))
                found[bound[cpp]] = [argument.rsplit(maxsplit=1)[0] for argument in given if argument]
    return found


def check_arguments(types: list[str], arguments: tuple[Any, ...]) -> None:
    """As pybind11 would: the number of arguments, and what each may be."""
    check(len(arguments) == len(types), f"{len(types)} arguments are bound, {len(arguments)} were given")
    for kind, argument in zip(types, arguments, strict=True):
        is_optional = "optional" in kind
        if "Tensor" in kind:
            is_right = isinstance(argument, torch.Tensor) or (is_optional and argument is None)
        else:
            is_right = isinstance(argument, float if "float" in kind else int) or (
                "float" in kind and isinstance(argument, int)
            )
        check(is_right, f"a {kind} was expected, not {type(argument).__name__}")


def install(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Let DeepSpeed's kernel wrappers load the stand-ins, on what says that it is an A100. Returns how often each is
    called, which goes on counting."""

    import mii_hcache.engine.modules.stock as stock

    calls: Counter[str] = Counter()
    types = signatures()

    def counted(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            check_arguments(types[function.__name__], arguments)
            calls[function.__name__] += 1
            return function(*arguments)

        return call

    def builder(functions: tuple[Any, ...], **more: Any) -> Any:
        module = SimpleNamespace(**{function.__name__: counted(function) for function in functions}, **more)
        return lambda: SimpleNamespace(load=lambda: module)

    builders = {
        "RaggedOpsBuilder": builder(RAGGED),
        "InferenceCoreBuilder": builder(CORE, create_handle=lambda: None),
    }
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("deepspeed.inference.v2.kernels."):
            for name, stand_in in builders.items():
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, stand_in)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(F, "linear", linear)
    monkeypatch.setattr(stock, "why_not_stock", lambda: None)
    return calls
