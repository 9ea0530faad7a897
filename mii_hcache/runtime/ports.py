"""All that the runtime asks of an engine. Engines implement these; the runtime imports none of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from mii_hcache.core.geometry import ModelGeometry
from mii_hcache.runtime.streams import Stream


class KVTarget(Protocol):
    """The blocks of one sequence, addressed by absolute token position.

    Engine thread only. Blocks for every position used must have been reserved. Ranges are half-open.

    Everything is launched on the stream that is current, the engine's own unless a caller makes it another (as
    `placing.py` does, which says who waits for whom).
    """

    def prepare(self) -> None:
        """Make, on the engine's own stream, whatever `project_hidden` and `write_kv` read of the target: before they
        are called on another stream, after the blocks were reserved. It is never changed. Does not wait for the
        device."""
        ...

    def fill(self, start: int, token_ids: torch.Tensor, num_layers: int) -> None:
        """Compute and write K and V of layers `[0, num_layers)` for tokens `[start, start + len(token_ids))` from
        their ids (`[num_tokens]`, int64, host): a prefill that stops early. Nothing is captured, no logits.

        K and V of all earlier tokens must be there in layers `[0, num_layers - 1)`; so one layer needs none, and any
        number of tokens may come at once. More layers: at most `EngineAdapter.max_fill_tokens` tokens."""
        ...

    def project_hidden(self, layer_idx: int, start: int, hidden: torch.Tensor) -> None:
        """Project and write K and V from `hidden`: `[num_tokens, hidden_size]`, the engine's dtype and device."""
        ...

    def write_kv(self, layer_idx: int, start: int, kv: torch.Tensor, stream: Stream) -> None:
        """Launch on `stream` the copies of `kv` into the blocks, as few as their order allows: `[num_tokens, 2,
        num_kv_heads, head_size]`, contiguous, keys rotated, the engine's dtype; host memory (pinned when the engine has
        a GPU), or the device's. Copies of its rows as they are, and nothing else: it may be a shape without memory
        (`meta`), whose rows only `stream` knows where to find."""
        ...

    def read_kv(self, layer_idx: int, start: int, out: torch.Tensor) -> None:
        """Copy K and V of `[start, start + len(out))` into `out`: `[num_tokens, 2, num_kv_heads, head_size]`, host
        memory (pinned when the engine has a GPU; then the copy is stream-ordered)."""
        ...

    def gather_kv(self, layers: Sequence[int], start: int, out: torch.Tensor) -> None:
        """Copy K and V of `[start, start + num_tokens)` in layer `layers[i]` into `out[i]`: `[num_layers, num_tokens,
        2, num_kv_heads, head_size]`, the engine's device, contiguous. In order on the compute stream: once this
        returns, the blocks may be overwritten or freed by whatever is launched there."""
        ...

    def commit(self, num_tokens: int) -> None:
        """Declare tokens `[0, num_tokens)` present: the one place where `seen_tokens` is set on a restore."""
        ...


class EngineAdapter(Protocol):
    """An engine that holds sequences in blocks."""

    @property
    def geometry(self) -> ModelGeometry: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def max_fill_tokens(self) -> int:
        """Most tokens of one `KVTarget.fill`; 0: this engine fills the first layer only."""
        ...

    @property
    def dtype(self) -> torch.dtype: ...

    def target(self, uid: int) -> KVTarget:
        """The blocks of a live sequence as they are now; ask again after its blocks changed."""
        ...
