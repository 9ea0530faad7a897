"""What one layer of one model costs on one machine: the numbers that every plan is made of.

The paper derives them from FLOPs and bandwidths (equations 4-9) and measures them in its scheduler's offline profile
(section 4.1). Here `LayerCost` is the interface, however the numbers came about:

    HardwareProfile   rates of a platform; costs from FLOPs and bytes (`core/platforms.py` has the paper's)
    custom profile    seconds per layer for a number of tokens, written by hand: `custom_cost`
    MeasuredProfile   a LayerCost per storage tier, measured on the machine that restores
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from mii_hcache.core.geometry import ChunkKind, ModelGeometry
from mii_hcache.errors import ConfigError

MAX_SPREAD = 2.0
"""Of a profile that is believed."""
MEASURED_VERSION = 1
"""Of the JSON form of `MeasuredProfile`."""


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """Seconds that one layer of one model takes on one machine (paper equations 4-9, measured instead of derived)."""

    io_hidden_s: float
    """Per token: reading one hidden row (IO_hidden of equation 4)."""
    io_kv_s: float
    """Per token: reading one kv row (equation 7)."""
    c_hidden_s: float
    """Per token: projecting K and V from a hidden row, rotating, placing in blocks (C_hidden of equation 5); with
    several ranks, gathering the row from them all, too."""
    c_gather_s: float = 0.0
    """Of `c_hidden_s`, the gathering; 0 of one rank. For people: plans need only the sum."""
    c_kv_s: float = 0.0
    """Per token: placing a loaded kv row in the blocks. About 0 on a GPU, a copy on a CPU."""
    c_token_s: float
    """Per token: the whole layer forward, without attention over keys (the linear part of equation 8)."""
    c_attention_s: float = 0.0
    """Per (query, key) pair of the layer forward (the quadratic part of equation 8)."""
    io_start_s: float = 0.0
    """Per tile read: latency that nothing hides."""
    c_start_s: float = 0.0
    """Per tile that is projected or placed, and per chunk of tokens that is sent through a layer."""
    c_forward_start_s: float = 0.0
    """Per chunk that is sent through a layer, on top of `c_start_s`: its weights are read, however few tokens come. It
    hides behind the products of a large chunk on a GPU; on a CPU, 64 tokens take half as long as 256."""
    io_slowdown: float = 1.0
    """Factor on reading while computing runs at the same time."""
    compute_slowdown: float = 1.0
    """Factor on computing while reading runs at the same time."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            least = 1.0 if item.name.endswith("_slowdown") else 0.0
            if not least <= value < math.inf:
                raise ConfigError(f"{item.name} must be a number >= {least:g}, got {value!r}")

    @property
    def forward_start_s(self) -> float:
        """Per chunk that is sent through a layer."""
        return self.c_start_s + self.c_forward_start_s

    def forward_s(self, start: int, num_tokens: int) -> float:
        """The whole layer for tokens `[start, start + num_tokens)`, each of which attends to all up to itself. Without
        starts."""
        num_pairs = num_tokens * start + num_tokens * (num_tokens + 1) / 2
        return self.c_token_s * num_tokens + self.c_attention_s * num_pairs

    def spread(self, chunk_tokens: int | None) -> LayerCost:
        """The same layer with the start of a forward as part of its tokens', for rules that are linear in tokens; None:
        chunks so long that it does not count."""
        start_s = self.c_forward_start_s / chunk_tokens if chunk_tokens else 0.0
        return replace(self, c_token_s=self.c_token_s + start_s, c_forward_start_s=0.0)

    def token_s(self, num_tokens: int) -> float:
        """The paper's C_token at this length: a layer forward per token, attention included."""
        return self.forward_s(0, num_tokens) / num_tokens

    def scaled(self, *, io: float = 1.0, compute: float = 1.0) -> LayerCost:
        """The same layer with reads `io` and computing `compute` times as long: a correction from what was observed, or
        one over the share of the machine that a restore gets."""
        return replace(
            self,
            io_hidden_s=io * self.io_hidden_s,
            io_kv_s=io * self.io_kv_s,
            io_start_s=io * self.io_start_s,
            c_hidden_s=compute * self.c_hidden_s,
            c_gather_s=compute * self.c_gather_s,
            c_kv_s=compute * self.c_kv_s,
            c_token_s=compute * self.c_token_s,
            c_attention_s=compute * self.c_attention_s,
            c_start_s=compute * self.c_start_s,
            c_forward_start_s=compute * self.c_forward_start_s,
        )

    def overlapped(self, io_s: float, compute_s: float) -> tuple[float, float]:
        """What `io_s` of reading and `compute_s` of computing become when they run side by side from the same moment:
        each is slowed while the other lasts. Unchanged when one of them is 0."""
        together_s = min(io_s * self.io_slowdown, compute_s * self.compute_slowdown)
        return (
            io_s + together_s * (1 - 1 / self.io_slowdown),
            compute_s + together_s * (1 - 1 / self.compute_slowdown),
        )


@dataclass(frozen=True, kw_only=True)
class HardwareProfile:
    """Effective rates of a platform, per GPU where not said otherwise. Effective: what large transfers and large
    matrix products reach, not what a datasheet promises."""

    name: str
    source: str
    """Where the rates come from, and whether they were measured."""
    read_bytes_per_s: Mapping[str, float]
    """Of each storage tier, all devices together, shared by all GPUs. The first one is the default."""
    h2d_bytes_per_s: float
    """Host (or device over PCIe) to one GPU."""
    gemm_flop_per_s: float
    attention_flop_per_s: float
    num_gpus: int = 1
    """Tensor-parallel GPUs; each reads its share of the bytes (paper section 5)."""
    link_bytes_per_s: float = math.inf
    """Between GPUs: hidden rows are gathered, layer outputs reduced."""
    io_start_s: float = 0.0
    c_start_s: float = 0.0

    def __post_init__(self) -> None:
        rates = {
            **{f"read_bytes_per_s[{tier!r}]": rate for tier, rate in self.read_bytes_per_s.items()},
            "h2d_bytes_per_s": self.h2d_bytes_per_s,
            "gemm_flop_per_s": self.gemm_flop_per_s,
            "attention_flop_per_s": self.attention_flop_per_s,
            "link_bytes_per_s": self.link_bytes_per_s,
        }
        for name, rate in rates.items():
            if not rate > 0:
                raise ConfigError(f"{name} must be > 0, got {rate!r}")
        if not self.read_bytes_per_s:
            raise ConfigError("read_bytes_per_s must name a storage tier, got none")
        if self.num_gpus < 1:
            raise ConfigError(f"num_gpus must be >= 1, got {self.num_gpus}")

    def layer_cost(self, geometry: ModelGeometry, tier: str | None = None) -> LayerCost:
        """From FLOPs and bytes: equations 4-8, with bytes per element, grouped heads and causal attention put right.

        Raises ConfigError for an unknown tier, and when the geometry does not know its feed-forward weights.
        """
        if geometry.ffn_weights == 0:
            raise ConfigError(
                f"ffn_weights must be known (> 0) for the costs of profile {self.name!r}, which come from FLOPs, got 0"
            )
        rate = min(_tier_of(self.read_bytes_per_s, tier, self.name), self.num_gpus * self.h2d_bytes_per_s)
        gemm_flop_per_s = self.num_gpus * self.gemm_flop_per_s
        width = geometry.num_heads * geometry.head_size
        kv_width = geometry.num_kv_heads * geometry.head_size
        hidden_bytes = geometry.row_bytes(ChunkKind.HIDDEN)
        weights = 2 * geometry.hidden_size * (width + kv_width) + geometry.ffn_weights
        gather_s = hidden_bytes * (1 - 1 / self.num_gpus) / self.link_bytes_per_s
        return LayerCost(
            io_hidden_s=hidden_bytes / rate,
            io_kv_s=geometry.row_bytes(ChunkKind.KV) / rate,
            c_hidden_s=4 * geometry.hidden_size * kv_width / gemm_flop_per_s + gather_s,
            c_gather_s=gather_s,
            c_token_s=2 * weights / gemm_flop_per_s + 4 * gather_s,  # two all-reduces, each twice a gather
            c_attention_s=4 * width / (self.num_gpus * self.attention_flop_per_s),
            io_start_s=self.io_start_s,
            c_start_s=self.c_start_s,
        )


@dataclass(frozen=True, kw_only=True)
class MeasuredProfile:
    """What a machine measured for one model."""

    machine: str
    """In words: processor or GPU, disks."""
    model: str
    """Fingerprint of the model, in hex."""
    date: str
    """ISO 8601."""
    tiers: Mapping[str, LayerCost]
    """By the name of the storage tier that is read from. The first one is the default."""
    shape: str = ""
    """The model's, in words (`ModelGeometry.shape`): costs hold for no other. Empty: not known."""
    spread: float = 1.0
    """How many times longer a typical run of a measurement was than the fastest: 1 on a quiet machine."""
    h2d_bytes_per_s: float = 0.0
    """From pinned host memory to the GPU, a tile at a time; 0 where there is no GPU. For people: what a restore copies
    is part of what its reads cost."""

    @property
    def is_doubtful(self) -> bool:
        """The machine was busy with something else."""
        return self.spread > MAX_SPREAD

    def __post_init__(self) -> None:
        if not self.tiers:
            raise ConfigError("tiers must name a storage tier, got none")

    def layer_cost(self, tier: str | None = None) -> LayerCost:
        """Raises ConfigError for a tier that was not measured."""
        cost: LayerCost = _tier_of(self.tiers, tier, "measured")
        return cost

    def to_json(self) -> str:
        """For a file."""
        return json.dumps({"version": MEASURED_VERSION, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> MeasuredProfile:
        """Inverse of `to_json`. Raises ConfigError that names the field."""
        parsed = _Object.parse(text, "a measured profile")
        version = parsed.take("version", int)
        if version != MEASURED_VERSION:
            raise ConfigError(f"version must be {MEASURED_VERSION}, got {version}: measure this machine again")
        bodies = parsed.take("tiers", dict)
        tiers = {tier: _layer_cost(_Object(f"tiers.{tier}.", body)) for tier, body in bodies.items()}
        profile = cls(
            machine=parsed.take("machine", str),
            model=parsed.take("model", str),
            date=parsed.take("date", str),
            shape=parsed.take("shape", str, ""),
            spread=parsed.take("spread", float, 1.0),
            h2d_bytes_per_s=parsed.take("h2d_bytes_per_s", float, 0.0),
            tiers=tiers,
        )
        parsed.end()
        return profile


def custom_cost(text: str) -> LayerCost:
    """Costs from a few numbers that a person wrote down, in JSON: seconds of one layer for `tokens` tokens.

        {"tokens": 1024, "io_hidden": 0.0003, "io_kv": 0.0006, "c_hidden": 0.0003, "c_token": 0.002}

    `c_kv` is optional. `c_token` holds its attention: all lengths then cost the same per token. Raises ConfigError
    that names the field.
    """
    parsed = _Object.parse(text, "a custom profile")
    num_tokens = parsed.take("tokens", int)
    if num_tokens < 1:
        raise ConfigError(f"tokens must be >= 1, got {num_tokens}")
    cost = LayerCost(
        **{f"{name}_s": parsed.take(name, float) / num_tokens for name in _CUSTOM},
        c_kv_s=parsed.take("c_kv", float, 0.0) / num_tokens,
    )
    parsed.end()
    return cost


_CUSTOM = ("io_hidden", "io_kv", "c_hidden", "c_token")


def _tier_of(tiers: Mapping[str, Any], tier: str | None, profile: str) -> Any:
    if tier is None:
        return next(iter(tiers.values()))
    if tier not in tiers:
        raise ConfigError(f"tier must be one of {', '.join(tiers)} in profile {profile!r}, got {tier!r}")
    return tiers[tier]


def _layer_cost(parsed: _Object) -> LayerCost:
    values = {}
    for item in fields(LayerCost):
        default = item.default if isinstance(item.default, float) else None
        values[item.name] = parsed.take(item.name, float, default)
    parsed.end()
    try:
        return LayerCost(**values)
    except ConfigError as error:
        raise ConfigError(f"{parsed.path}{error}") from None


@dataclass(kw_only=False)
class _Object:
    """A JSON object whose fields are taken one by one; every complaint names the field."""

    path: str
    body: Any
    taken: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if not isinstance(self.body, dict):
            name = self.path.rstrip(".") or "the profile"
            raise ConfigError(f"{name} must be a JSON object, got {self.body!r:.80}")

    @classmethod
    def parse(cls, text: str, what: str) -> _Object:
        """The top of a document."""
        try:
            return cls("", json.loads(text))
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{what} must be JSON: {error}") from None

    def take(self, name: str, kind: type, default: Any = None) -> Any:
        """The value of a field, of this type; whole numbers do as floats."""
        self.taken.add(name)
        if name not in self.body:
            if default is None:
                raise ConfigError(f"{self.path}{name} is missing: {kind.__name__}")
            return default
        value = self.body[name]
        kinds = (int, float) if kind is float else (kind,)
        is_odd = isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value))
        if not isinstance(value, kinds) or is_odd:
            raise ConfigError(f"{self.path}{name} must be of type {kind.__name__}, got {value!r:.80}")
        return value

    def end(self) -> None:
        """Raises ConfigError when a field was never taken."""
        unknown = sorted(set(self.body) - self.taken)
        if unknown:
            known = ", ".join(sorted(self.taken))
            raise ConfigError(f"unknown field {self.path}{unknown[0]}; known: {known}")
