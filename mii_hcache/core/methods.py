"""The restoration methods and their names. The command line's choices come from here."""

from __future__ import annotations

from dataclasses import dataclass

from mii_hcache.core.geometry import ChunkKind, ModelGeometry
from mii_hcache.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to bring a context's K and V back."""

    name: str
    saved_kind: ChunkKind | None
    """Kind of chunk that is saved while serving; None when nothing is saved."""
    summary: str


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="hidden",
            saved_kind=ChunkKind.HIDDEN,
            summary="save each layer's QKV input, project K and V from it on restore (HCache)",
        ),
        Method(
            name="kv",
            saved_kind=ChunkKind.KV,
            summary="save K and V, copy them back on restore (AttentionStore-style offload)",
        ),
        Method(
            name="recompute",
            saved_kind=None,
            summary="save nothing, prefill the whole history again (what MII does)",
        ),
    )
}


def method_named(name: str) -> Method:
    """Raises ConfigError for an unknown name."""
    try:
        return METHODS[name]
    except KeyError:
        raise ConfigError(f"method must be one of {', '.join(METHODS)}, got {name!r}") from None


def default_method(geometry: ModelGeometry) -> Method:
    """`hidden` where its row is smaller than K and V, else `kv` (most GQA models)."""
    hidden_is_smaller = geometry.row_bytes(ChunkKind.HIDDEN) < geometry.row_bytes(ChunkKind.KV)
    return METHODS["hidden" if hidden_is_smaller else "kv"]
