"""What a server says once it is ready: what it serves, how it saves, how much room there is, where to ask."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind
from mii_hcache.serve.options import Options, format_size

if TYPE_CHECKING:
    from mii_hcache.engine.open import OpenedService

_KEEP_WORDS = {
    "lru": "they stay after a turn until they are needed",
    "none": "they are evicted after every turn",
}


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One server's."""

    options: Options
    opened: OpenedService
    url: str
    is_loopback: bool
    seconds: float
    """From the start to being ready."""

    def text(self) -> str:
        """For people."""
        rows = {
            "model": self._model(),
            "method": self._method(),
            "KV pool": self._pool(),
            "state": self._state(),
            "room": self._room(),
            "address": f"{self.url}  (OpenAI's API under /v1, /health, /metrics)",
            "access": self._access(),
        }
        lines = ["", *(f"  {name:<9}{words}" for name, words in rows.items())]
        lines += [f"  {'note':<9}{note}" for note in self.opened.notes]
        lines += ["", f"Ready after {self.seconds:.1f} s. Try it:", "", f"  {self._curl_line()}", ""]
        return "\n".join(lines)

    def fields(self) -> dict[str, Any]:
        """For programs."""
        config, service = self.options.config, self.opened.service
        geometry, metrics = service.geometry, service.metrics()
        return {
            "model": self.opened.model_name,
            "dtype": geometry.dtype,
            "max_context_tokens": service.max_context_tokens,
            "method": self.opened.method.name,
            "hidden_bytes_per_token": geometry.bytes_per_token(ChunkKind.HIDDEN),
            "kv_bytes_per_token": geometry.bytes_per_token(ChunkKind.KV),
            "kv_blocks": int(metrics.get("blocks", 0)),
            "block_size": int(metrics.get("block_tokens", 0)),
            "keep": config.keep,
            "state_dir": list(config.state_dirs) if len(config.state_dirs) > 1 else config.state_dirs[0],
            "state_capacity_tokens": self._tokens_in(config.state_capacity_bytes),
            "saved_tokens": SPAN_TOKENS * int(metrics.get("store_spans", 0)),
            "url": self.url,
            "num_api_keys": len(self.options.access.keys),
            "notes": list(self.opened.notes),
            "elapsed_s": round(self.seconds, 1),
        }

    def _model(self) -> str:
        service = self.opened.service
        geometry = service.geometry
        return (
            f"{self.opened.model_name}, {geometry.dtype}, {geometry.num_layers} layers of {geometry.hidden_size}; "
            f"conversations up to {service.max_context_tokens:,} tokens"
        )

    def _method(self) -> str:
        geometry, opened = self.opened.service.geometry, self.opened
        hidden, kv = (geometry.bytes_per_token(kind) for kind in (ChunkKind.HIDDEN, ChunkKind.KV))
        text = f"{opened.method.name}, {opened.why_method}"
        if opened.storage is not None:
            num_bytes = opened.storage.bytes_per_token(geometry)
            text += f"; saves {opened.storage.words}, {format_size(round(num_bytes))} a token"
        sizes = f"all hidden {format_size(round(hidden))}, all K and V {format_size(round(kv))}"
        return f"{text} ({sizes})"

    def _pool(self) -> str:
        metrics, keep = self.opened.service.metrics(), self.options.config.keep
        num_blocks, block_size = int(metrics.get("blocks", 0)), int(metrics.get("block_tokens", 0))
        return f"{num_blocks * block_size:,} tokens in {num_blocks:,} blocks; {_KEEP_WORDS[keep]} (--keep {keep})"

    def _state(self) -> str:
        config = self.options.config
        directories = ", ".join(config.state_dirs)
        num_spans = int(self.opened.service.metrics().get("store_spans", 0))
        there = f"{num_spans * SPAN_TOKENS:,} tokens in {num_spans:,} spans are there" if num_spans else "nothing yet"
        return f"{directories}: {there}"

    def _room(self) -> str:
        config = self.options.config
        on_disk, in_memory = self._tokens_in(config.state_capacity_bytes), self._tokens_in(config.dram_capacity_bytes)
        if on_disk is None:
            return "nothing will be saved"
        disk, dram = format_size(config.state_capacity_bytes), format_size(config.dram_capacity_bytes)
        text = f"for {on_disk:,} tokens on disk ({disk})"
        if config.tensor_parallel > 1:  # ranks share files only
            return text
        return f"{text}, {in_memory:,} of them in memory as well ({dram})"

    def _tokens_in(self, num_bytes: int) -> int | None:
        """Whole spans; None when nothing is saved."""
        storage = self.opened.storage
        if storage is None:
            return None
        span_bytes = SPAN_TOKENS * storage.bytes_per_token(self.opened.service.geometry)
        return SPAN_TOKENS * int(num_bytes // span_bytes)

    def _access(self) -> str:
        num_keys = len(self.options.access.keys)
        if num_keys:
            return f"{num_keys} API key{'s' * (num_keys > 1)}; no two of them share state"
        if self.is_loopback:
            return "this machine only, without a key"
        return "ANYBODY who can reach this machine: there is no key, as --allow-no-key says"

    def _curl_line(self) -> str:
        if self.opened.tokenizer.has_chat_template:
            path = "chat/completions"
            body: dict[str, object] = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 50}
        else:  # a base model
            path, body = "completions", {"prompt": "Once upon a time", "max_tokens": 50}
        key = ' -H "Authorization: Bearer $MII_HCACHE_API_KEY"' if len(self.options.access.keys) else ""
        return f"curl {self.url}/v1/{path} -H 'Content-Type: application/json'{key} -d {shlex.quote(json.dumps(body))}"
