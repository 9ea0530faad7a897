"""Faults put in on purpose: a check that cannot fail proves nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mii_hcache.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from mii_hcache.engine.ragged_engine import HCacheEngine

FAULTS = ("swap-rows", "corrupt-logits")


@dataclass(frozen=True, kw_only=True)
class Injection:
    """What `--inject FAULT[@WAY]` asks for.

    `swap-rows`: in one layer, two neighbouring tokens have each other's V after a restore (had they each other's K as
    well, attention would add up the same). `corrupt-logits`: one logit of the answer is wrong.
    """

    fault: str
    way: str | None = None
    """The row of the table to spoil, None for every restored one."""

    @staticmethod
    def parse(text: str) -> Injection:
        """Raises ConfigError."""
        fault, _, way = text.partition("@")
        if fault not in FAULTS:
            raise ConfigError(f"--inject must be one of {', '.join(FAULTS)}, perhaps with @WAY, got {text!r}")
        return Injection(fault=fault, way=way or None)

    def spoil_blocks(self, way: str, engine: HCacheEngine, uid: int, num_tokens: int) -> None:
        """After a restore of `num_tokens` tokens, before anything is run."""
        if self.fault != "swap-rows" or self.way not in (None, way):
            return
        import torch

        from mii_hcache.runtime.streams import streams_of

        geometry, target = engine.geometry, engine.target(uid)
        layer_idx, start = geometry.num_layers // 2, num_tokens // 2
        rows = torch.empty(2, 2, geometry.num_kv_heads, geometry.head_size, dtype=engine.dtype)
        target.read_kv(layer_idx, start, rows)
        rows[:, 1] = rows[:, 1].flip(0)
        target.write_kv(layer_idx, start, rows.to(engine.device), streams_of(engine.device).main)

    def spoil_logits(self, way: str, logits: torch.Tensor) -> None:
        """`logits`: `[num_answer, vocab_size]`, of an answer to a restored history."""
        if self.fault == "corrupt-logits" and self.way in (None, way):
            logits[-1, 0] += logits.abs().max()
