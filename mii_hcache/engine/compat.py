"""Every change that mii_hcache makes to DeepSpeed and MII at run time, each with the upstream line it mends.

Tried with deepspeed 0.19.8 and deepspeed-mii 0.3.3. `install()` is idempotent, touches nothing on disk, and names the
upstream attribute that is missing when another version moved it.

| what | why |
|---|---|
| CPU accelerator's device is `cpu` | `cpu_accelerator.py current_device()` returns 0, used as a device all over v2 |
| ragged utilities in Python | `RaggedUtilsBuilder` needs nvcc, and raises on CPU; three module globals hold it |
| our block allocator | `blocked_allocator.py` pins host memory (needs CUDA) and is slow |
| no shared-memory comm build | `comm/torch.py` compiles a C++ op for 33 s at first `init_distributed` |
| process group from an in-memory store | `init_distributed` would open a TCP port or look for MPI |

What upstream breaks and we never call: `InferenceEngineV2.can_schedule` (compares a list with an int),
`RaggedBatchWrapper.finalize` twice without waiting (its pinned buffers are written again too early),
`maybe_allocate_kv` without a check (allocates fewer blocks than needed, silently), MII's `reset_request_status` (drops
generated tokens, asserts under pressure), MII's `LogitsProcessor`s (a global registry that only grows). See
`engine/ragged_engine.py` and `engine/scheduler.py`.
"""

from __future__ import annotations

import atexit
import importlib
import logging
import os
import threading
import types
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from mii_hcache.engine.blocks import BlockAllocator
from mii_hcache.errors import HCacheError

TRIED_VERSIONS = {"deepspeed": "0.19.8", "deepspeed-mii": "0.3.3"}

_RAGGED_UTILS_USERS = (
    "deepspeed.inference.v2.ragged.ragged_manager",
    "deepspeed.inference.v2.ragged.ragged_wrapper",
    "deepspeed.inference.v2.model_implementations.flat_model_helpers",
)
_ALLOCATOR_USERS = ("deepspeed.inference.v2.ragged.ragged_manager", "deepspeed.inference.v2.ragged.kv_cache")

NEEDED_NAMES = (
    *(f"{module}:RaggedUtilsBuilder" for module in _RAGGED_UTILS_USERS),
    *(f"{module}:BlockedAllocator" for module in _ALLOCATOR_USERS),
    "deepspeed.accelerator:set_accelerator",
    "deepspeed.accelerator.cpu_accelerator:CPU_Accelerator.current_device",
    "deepspeed.accelerator.cpu_accelerator:CPU_Accelerator.create_op_builder",
    "deepspeed.comm.comm:init_distributed",
    "deepspeed.inference.v2.engine_v2:InferenceEngineV2.put",
    "deepspeed.inference.v2.engine_v2:InferenceEngineV2.flush",
    "deepspeed.inference.v2.engine_v2:InferenceEngineV2.query",
    "deepspeed.inference.v2.engine_v2:InferenceEngineV2.get_remaining_block_capacity",
    "deepspeed.inference.v2.ragged.ragged_wrapper:RaggedBatchWrapper.finalize",
    "deepspeed.inference.v2.ragged.ragged_wrapper:RaggedBatchWrapper.insert_sequence",
    "deepspeed.inference.v2.ragged.sequence_descriptor:DSSequenceDescriptor.pre_forward",
    "deepspeed.inference.v2.ragged.sequence_descriptor:DSSequenceDescriptor.post_forward",
    "deepspeed.inference.v2.ragged.sequence_descriptor:DSSequenceDescriptor.extend_kv_cache",
    "deepspeed.inference.v2.ragged.sequence_descriptor:DSSequenceDescriptor.kv_cache_ids",
    "deepspeed.inference.v2.model_implementations.inference_transformer_base:DSTransformerModelBase.maybe_allocate_kv",
    "deepspeed.inference.v2.model_implementations.inference_transformer_base:DSTransformerModelBase.prepare_batch",
    "deepspeed.inference.v2.model_implementations.inference_policy_base:InferenceV2Policy.build_container_map",
    "deepspeed.inference.v2.model_implementations.llama_v2.model:Llama2InferenceModel.forward",
    "deepspeed.inference.v2.model_implementations.llama_v2.container:Llama2TransformerContainer.PARAM_MAPPING",
    "deepspeed.inference.v2.model_implementations.mixtral.model:MixtralInferenceModel.make_moe_layer",
    "deepspeed.inference.v2.model_implementations.mixtral.container:MixtralTransformerContainer.PARAM_MAPPING",
    "deepspeed.inference.v2.model_implementations.opt.model:OPTInferenceModel.forward",
    "deepspeed.inference.v2.model_implementations.opt.container:OPTTransformerContainer.PARAM_MAPPING",
    "deepspeed.inference.v2.model_implementations.phi3.containers:Phi3TransformerContainer.PARAM_MAPPING",
    "deepspeed.inference.v2.model_implementations.qwen_v2.container:Qwen2TransformerContainer.PARAM_MAPPING",
    "deepspeed.inference.v2.modules.heuristics:instantiate_attention",
    "deepspeed.inference.v2.modules.heuristics:instantiate_pre_norm",
    "mii.batching.ragged_batching:RaggedBatchBase.generate",
    "mii.batching.ragged_batching:RaggedBatchBase.schedule_requests",
    "mii.batching.ragged_batching:RaggedBatchBase._schedule_token_gen",
    "mii.batching.ragged_batching:RaggedBatchBase._schedule_prompts",
    "mii.batching.ragged_batching:RaggedBatchBase._bcast_requests",
    "mii.batching.ragged_batching:RaggedBatchBase._process_logits",
    "mii.batching.ragged_batching:RaggedBatchBase._generate_output",
    "mii.batching.ragged_batching:RaggedBatchBase.reset_request_status",
    "mii.batching.data_classes:Request.stop_generation",
    "mii.batching.data_classes:RequestBatch.prune",
)
"""`module:name.name` of everything upstream that this package patches, overrides or leans on."""


def missing_names(names: Sequence[str] = NEEDED_NAMES) -> list[str]:
    """Those of `names` that the installed versions do not have."""
    missing = []
    for name in names:
        module_name, _, path = name.partition(":")
        try:
            target: Any = importlib.import_module(module_name)
            for part in path.split("."):
                target = getattr(target, part)
        except (ImportError, AttributeError):
            missing.append(name)
    return missing


def _ragged_utils() -> types.SimpleNamespace:
    """Python stand-in for the three functions of DeepSpeed's `RaggedUtils` extension."""

    def pinned_like(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=torch.cuda.is_available())

    def view(
        buffer: torch.Tensor, offset: int, dtype: torch.dtype, shape: Sequence[int], strides: Sequence[int]
    ) -> torch.Tensor:
        num_elements = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        flat = buffer.narrow(0, offset, num_elements * dtype.itemsize).view(dtype)
        return flat.as_strided(tuple(shape), tuple(strides))

    return types.SimpleNamespace(
        allocate_fast_host_buffer=pinned_like,
        allocate_view_on=lambda tensor, buffer, offset: view(
            buffer, offset, tensor.dtype, tensor.shape, tensor.stride()
        ),
        allocate_view_like=lambda shape, strides, like, buffer, offset: view(
            buffer, offset, like.dtype, shape, strides
        ),
    )


class _RaggedUtilsBuilder:
    def load(self, verbose: bool = True) -> types.SimpleNamespace:
        return _ragged_utils()


def _install_cpu_accelerator() -> None:
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class PortableCpuAccelerator(CPU_Accelerator):  # type: ignore[misc]
        def current_device(self) -> str:
            return "cpu"

        def create_op_builder(self, op_name: str) -> Any:
            return None if op_name == "ShareMemCommBuilder" else super().create_op_builder(op_name)

        def device_count(self) -> int:
            return int(os.environ.get("LOCAL_SIZE", "1"))

    set_accelerator(PortableCpuAccelerator())


def _init_single_process_group() -> None:
    import deepspeed
    import torch.distributed as torch_dist

    if torch_dist.is_initialized():
        return
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        os.environ.setdefault(name, value)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch_dist.init_process_group(backend, store=torch_dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    # Left to the interpreter's exit, gloo's threads end the process with `terminate called`.
    atexit.register(torch_dist.destroy_process_group)


_installed = False
_installing = threading.Lock()


def install() -> None:
    """Apply the table above, once per process. Any thread. Raises HCacheError naming what upstream lacks."""
    global _installed
    with _installing:
        if not _installed:
            _install()
            _installed = True


def _install() -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        missing = missing_names()
    if missing:
        tried = ", ".join(f"{name} {version}" for name, version in TRIED_VERSIONS.items())
        raise HCacheError(
            f"the installed DeepSpeed or MII lacks {', '.join(missing)}; mii_hcache was tried with {tried}: "
            "install those (constraints.txt pins them)"
        )
    if not torch.cuda.is_available():
        _install_cpu_accelerator()
    for module_name in _RAGGED_UTILS_USERS:
        importlib.import_module(module_name).RaggedUtilsBuilder = _RaggedUtilsBuilder  # type: ignore[attr-defined]
    for module_name in _ALLOCATOR_USERS:
        importlib.import_module(module_name).BlockedAllocator = BlockAllocator  # type: ignore[attr-defined]
    from deepspeed.inference.v2.logging import inference_logger

    inference_logger(level=logging.WARNING)
    _init_single_process_group()
