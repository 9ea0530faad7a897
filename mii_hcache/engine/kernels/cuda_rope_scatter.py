"""Rotary embedding and the way into the blocks by a CUDA C++ kernel (csrc/gpu/rope_scatter.cu): what `rope_scatter`
does in Triton, with the same arguments.

Chosen only by whoever calls it: which of the two is faster has not been measured, and **neither has run on a GPU**. It
needs a package that was installed where nvcc is, and then neither Triton nor a compiler.
"""

from __future__ import annotations

import torch

from mii_hcache.storage.native import new_gpu, new_kernels

Tables = tuple[torch.Tensor, torch.Tensor]
_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


class CudaRopeScatter:
    """The kernel on one GPU, as a function. Any thread."""

    def __init__(self, device: torch.device) -> None:
        """Takes the GPU's primary context, which is torch's. Only where `native.why_no_kernels` is None. Raises
        OSError, also when the kernels were built for other GPUs."""
        self.device = device
        self._gpu = new_gpu(device.index or 0)
        try:
            self._kernels = new_kernels(self._gpu)
        except OSError:
            self._gpu.close()
            raise

    def close(self) -> None:
        """Unload the kernels: only when nothing that was launched is still to run."""
        self._kernels.close()
        self._gpu.close()

    def _stream(self) -> int:
        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def __call__(
        self,
        rows: torch.Tensor,
        kv_cache: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        tables: Tables | torch.Tensor | None,
        *,
        query_heads: int,
        k_gamma: torch.Tensor | None = None,
        eps: float = 0.0,
        q_gamma: torch.Tensor | None = None,
    ) -> None:
        """Rotate q in place; rotate k and write it, and v, to their blocks. `k_gamma` and `q_gamma`, `[head_size]`
        each, norm the heads before: k's alone in a restore, both or neither where there are queries.

        rows: `[num_tokens, (query_heads + 2 * num_kv_heads) * head_size]`, heads of q, then k, then v; restoring has no
        queries. kv_cache: `[num_blocks, block_size, 2, num_kv_heads, head_size]`, the dtype of `rows`. positions,
        slots: `[num_tokens]`, int64, no slot twice; slots are rows of the cache seen as
        `[num_blocks * block_size, ...]`. One outside the cache, or a position outside the tables, ends the CUDA
        context: every later call of this process on the GPU fails.

        tables: cosine and sine, `[num_positions, rotary_dim / 2]` each, longer than every position (`make_tables`); or
        inverse frequencies, `[rotary_dim / 2]`, float32, from which the kernel works out what the tables would have, to
        1 in the last place of CUDA's sine and cosine; or None: nothing turns. All on the GPU. Launched on the current
        stream; nothing is waited for. Raises ValueError, and launches nothing, for what does not fit.
        """
        num_tokens = rows.shape[0]
        kv_heads, head_size = kv_cache.shape[-2:]
        expected = (num_tokens, (query_heads + 2 * kv_heads) * head_size)
        if rows.shape != expected or rows.stride(-1) != 1 or rows.dtype != kv_cache.dtype:
            raise ValueError(f"rows {tuple(rows.shape)} {rows.dtype} do not fit {expected} of a {kv_cache.dtype} cache")
        if rows.dtype not in _DTYPES or kv_cache.dim() != 5 or kv_cache.shape[2] != 2 or not kv_cache.is_contiguous():
            raise ValueError(f"no cache of K and V: {tuple(kv_cache.shape)} {kv_cache.dtype}")
        for name, index in (("positions", positions), ("slots", slots)):
            if index.shape != (num_tokens,) or index.dtype != torch.int64 or not index.is_contiguous():
                raise ValueError(f"{name} {tuple(index.shape)} {index.dtype} of {num_tokens} tokens")
        if (q_gamma is not None) != (k_gamma is not None and query_heads > 0):
            raise ValueError("heads are normed in q and k or in neither, and a restore has no q")
        for gamma in (q_gamma, k_gamma):
            if gamma is not None and (
                gamma.shape != (head_size,) or gamma.dtype != rows.dtype or gamma.stride() != (1,)
            ):
                raise ValueError(f"gamma {tuple(gamma.shape)} {gamma.dtype} of heads of {head_size} {rows.dtype}")
        cosines, sines, inv_freq = _angles(tables)
        some = [rows, kv_cache, positions, slots, q_gamma, k_gamma, cosines, sines, inv_freq]
        if any(tensor is not None and tensor.device != self.device for tensor in some):
            raise ValueError(f"not everything is on {self.device}")
        angles = cosines if cosines is not None else inv_freq
        self._kernels.place_rows(
            dtype=_DTYPES[rows.dtype],
            rows=rows.data_ptr(),
            row_stride=rows.stride(0),
            cache=kv_cache.data_ptr(),
            num_slots=kv_cache.shape[0] * kv_cache.shape[1],
            positions=positions.data_ptr(),
            slots=slots.data_ptr(),
            num_tokens=num_tokens,
            sines=_address(sines),
            cosines=_address(cosines),
            num_positions=0 if cosines is None else cosines.shape[0],
            inv_freq=_address(inv_freq),
            rotary_dim=0 if angles is None else 2 * angles.shape[-1],
            num_heads=query_heads,
            num_kv_heads=kv_heads,
            head_size=head_size,
            q_gamma=_address(q_gamma),
            k_gamma=_address(k_gamma),
            eps=eps,
            stream=self._stream(),
        )


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _angles(
    tables: Tables | torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Cosines, sines, inverse frequencies. Raises ValueError for what is none of the three ways."""
    if tables is None:
        return None, None, None
    given = [tables] if isinstance(tables, torch.Tensor) else list(tables)
    num_axes = 1 if isinstance(tables, torch.Tensor) else 2
    if any(one.dtype != torch.float32 or one.dim() != num_axes or not one.is_contiguous() for one in given):
        raise ValueError(
            "angles are float32: two contiguous tables [num_positions, rotary_dim / 2], or [rotary_dim / 2]"
        )
    if isinstance(tables, torch.Tensor):
        return None, None, tables
    if tables[0].shape != tables[1].shape:
        raise ValueError(f"cosines {tuple(tables[0].shape)}, sines {tuple(tables[1].shape)}")
    return tables[0], tables[1], None
