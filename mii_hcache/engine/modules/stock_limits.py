"""What DeepSpeed's kernels need of a machine, and what they can do of a model.

Read from the sources of deepspeed 0.19.8; what they do not say themselves, or only by computing nothing at all, is
refused here before a model is loaded. None of it was tried on a GPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
from typing import Any

import torch

from mii_hcache.engine.rotary import head_size_of, inverse_frequencies, windows_of

HEAD_SIZES = (64, 80, 96, 128)
QUERY_GROUPS = (1, 2, 4, 5, 8)
"""Query heads of a KV head, of the kernels that place K and V."""
CHANNELS = (129, 16384)
"""Hidden sizes, least and most. Norms of at most 128 channels pack several rows into a block without asking whether
the last are there; beyond 16,384 no kernel is launched, and nothing says so."""
MOST_GATED = 28672
"""Most channels behind a gated activation."""
_INT32_ELEMENTS = 2**31 - 1


def why_not_stock() -> str | None:
    """Why DeepSpeed's kernels cannot run on this machine, with what to do about it; None when nothing is known to be in
    the way. Builds nothing."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    major, minor = torch.cuda.get_device_capability()
    if major != 8 and (major, minor) != (9, 0):
        return (
            f"DeepSpeed's attention kernel takes GPUs of compute capability 8.0 to 9.0 (A100 to H200), this one has "
            f"{major}.{minor}"
        )
    return _why_no_library() or _why_no_compiler()


def _why_no_library() -> str | None:
    """deepspeed-kernels holds FlashAttention as a library that every ragged kernel is linked with."""
    found = importlib.util.find_spec("dskernels")
    if found is None or found.origin is None:
        return "deepspeed-kernels is not installed; pip install deepspeed-kernels"
    library = os.path.join(os.path.dirname(found.origin), "libblockedflash.so")
    if not os.path.exists(library):
        return f"deepspeed-kernels is installed without {library}; pip install --force-reinstall deepspeed-kernels"
    return None


def _why_no_compiler() -> str | None:
    """DeepSpeed builds its kernels at the first use, unless they were built when it was installed."""
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder import builder
    from torch.utils.cpp_extension import is_ninja_available

    if all(installed_ops.get(name, False) for name in ("ragged_device_ops", "inference_core_ops")):
        return None
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it accepts
            builder.assert_no_cuda_mismatch()
    except builder.MissingCUDAException:
        return (
            "there is no nvcc, with which DeepSpeed builds its kernels; install the CUDA toolkit "
            f"{torch.version.cuda} and set CUDA_HOME to it"
        )
    except builder.CUDAMismatchException:
        major, minor = builder.installed_cuda_version()
        return (
            f"nvcc is of CUDA {major}.{minor}, torch of {torch.version.cuda}; install the CUDA toolkit "
            f"{torch.version.cuda} and set CUDA_HOME to it (or set DS_SKIP_CUDA_CHECK=1, at your own risk)"
        )
    if not is_ninja_available():
        return "ninja is missing, with which DeepSpeed builds its kernels; pip install ninja"
    return None


def refusal_of(config: Any, max_context_tokens: int) -> str | None:
    """Why DeepSpeed's kernels cannot compute a model, from its transformers config with the dtype it is loaded in;
    None when they can. Families and variants that nothing serves were refused before."""
    if config.dtype not in (torch.float16, torch.bfloat16):
        return f"they compute in float16 and bfloat16, not in {str(config.dtype).removeprefix('torch.')}"
    head_size = head_size_of(config)
    if head_size not in HEAD_SIZES:
        return f"they take heads of {', '.join(map(str, HEAD_SIZES))} elements, this model's have {head_size}"
    num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    group, rest = divmod(config.num_attention_heads, num_kv_heads)
    if rest or group not in QUERY_GROUPS:
        return (
            f"they take {', '.join(map(str, QUERY_GROUPS))} query heads to a KV head, this model has "
            f"{config.num_attention_heads} to {num_kv_heads}"
        )
    if not CHANNELS[0] <= config.hidden_size <= CHANNELS[1] or config.hidden_size % 8:
        return f"their norms take {CHANNELS[0]} to {CHANNELS[1]} channels, by eights, not {config.hidden_size}"
    return _refuse_activation(config) or _refuse_positions(config, head_size, max_context_tokens)


def _refuse_activation(config: Any) -> str | None:
    if config.model_type == "opt":
        return f"ffn_dim {config.ffn_dim} is no multiple of 8" if config.ffn_dim % 8 else None
    if config.intermediate_size > MOST_GATED or config.intermediate_size % 4:
        return (
            f"their gated activation takes at most {MOST_GATED} channels, by fours; this model has "
            f"{config.intermediate_size}"
        )
    return None


def _refuse_positions(config: Any, head_size: int, max_context_tokens: int) -> str | None:
    window = min((window for window in windows_of(config) if window is not None), default=None)
    if window is not None and window < max_context_tokens:
        return (
            f"they have no sliding window, this model's is {window} tokens; a max_context_tokens of at most {window} "
            "makes do without"
        )
    if config.model_type == "opt":
        return None
    rotary_dim = 2 * inverse_frequencies(config).numel()
    if rotary_dim % 16:
        return f"they rotate heads by sixteens of elements, this model {rotary_dim} of {head_size}"
    return None


def block_size_of(config: Any) -> int:
    """Tokens of a KV block, as the attention kernel wants it for this head size on this GPU."""
    from deepspeed.inference.v2.kernels.ragged_ops import get_kv_block_size

    return int(get_kv_block_size(head_size_of(config)))


def most_blocks(config: Any) -> int:
    """Blocks of a pool in which the kernels, which count a layer's elements in 32 bits, still find everything."""
    num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return _INT32_ELEMENTS // (block_size_of(config) * 2 * num_kv_heads * head_size_of(config))
