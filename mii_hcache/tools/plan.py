"""`python -m mii_hcache plan`: what would be stored for a model, and how long histories would take to come back."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mii_hcache.config import DTYPE_NAMES, quiet_libraries
from mii_hcache.core.cost import LayerCost
from mii_hcache.core.geometry import SPAN_TOKENS, ModelGeometry
from mii_hcache.core.methods import METHODS, method_named, plan_storage
from mii_hcache.core.planner import lengths_up_to
from mii_hcache.core.plans import RestorePlan, StoragePlan
from mii_hcache.core.platforms import PLATFORMS
from mii_hcache.errors import ConfigError
from mii_hcache.tools.directories import add_state_dir, chosen_dirs, home_of
from mii_hcache.tools.profiles import Profile, load_profile
from mii_hcache.tools.table import size, table

_DEFAULT_TILE_TOKENS = 512
_DESCRIPTION = """\
Plans from a model's config.json alone: no weights, no GPU, nothing is written. For every method: what it stores, and
how it brings a history of some length back, with the time that reading and computing would take side by side.

A layer's state comes back in one of three ways. RE: recomputed, no reading. H: its hidden state is read, K and V are
projected from it. KV: K and V are read. Method `auto` picks what balances reading against computing best.
"""
_EXAMPLES = f"""\
examples:
  python -m mii_hcache plan --model ./llama --profile h200-dram
      histories of 1,024, 4,096 and 16,384 tokens, as far as the model's context goes
  python -m mii_hcache plan --model ./llama/config.json --profile a100-4ssd --tokens 8192 --method hcache
      the paper's schedule for one length
  python -m mii_hcache plan --model ./llama --profile mine.json --json
      for a script; mine.json: {{"tokens": 1024, "io_hidden": 3e-4, "io_kv": 6e-4, "c_hidden": 3e-4, "c_token": 2e-3}}
      (seconds that one layer takes for so many tokens: reading hidden rows, reading kv rows, projecting, recomputing)

profiles: {", ".join(PLATFORMS)};
or a JSON file; without --profile what was measured on this machine. Times are predictions, as good as the profile.

methods:
{chr(10).join(f"  {name:<18}  {method.summary}" for name, method in METHODS.items())}

exit status: 0 planned, 2 not (one line says why)
"""


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One method at one length."""

    stored: StoragePlan
    restored: RestorePlan
    bytes_per_token: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        timeline = self.restored.timeline
        return {
            "method": self.stored.method,
            "num_tokens": self.restored.num_tokens,
            "hidden_layers": self.stored.hidden_layers,
            "kv_layers": self.stored.kv_layers,
            "recompute_layers": self.restored.recompute_layers,
            "recompute_tokens": self.restored.recompute_tokens,
            "io_s": timeline.io_s,
            "compute_s": timeline.compute_s,
            "makespan_s": timeline.makespan_s,
            "bubble_s": timeline.bubble_s,
            "bytes_per_token": self.bytes_per_token,
        }

    def cells(self, chosen: str) -> list[str]:
        """For the table."""
        timeline, plan = self.restored.timeline, self.restored
        return [
            f"{'>' if self.stored.method == chosen else ' '} {self.stored.method}",
            self.stored.summary if self.bytes_per_token else "-",
            size(self.bytes_per_token) if self.bytes_per_token else "-",
            f"{plan.recompute_tokens:,}",
            f"{plan.recompute_layers}",
            f"{1e3 * timeline.io_s:.2f}",
            f"{1e3 * timeline.compute_s:.2f}",
            f"{1e3 * timeline.makespan_s:.2f}",
            f"{timeline.bubble_fraction:.1%}",
            f"{plan.num_tokens / timeline.makespan_s:,.0f}" if timeline.makespan_s else "-",
        ]


def main(arguments: Sequence[str] | None = None) -> int:
    """0. Raises HCacheError when there is nothing to plan from."""
    options = _parser().parse_args(arguments)
    method_named(options.method)
    profile = load_profile(options.profile, home_of(chosen_dirs(options.state_dir)))
    geometry, context_tokens = _model(options.model, options.dtype)
    cost = profile.layer_cost(geometry, options.tier)
    lengths = _lengths(options.tokens, context_tokens)
    rows = _rows(geometry, cost, lengths, options.tile_tokens)
    if options.json:
        found = [_to_dict(rows, options.method, length) for length in lengths]
        print(json.dumps(found[0] if len(found) == 1 else found, indent=2))
    else:
        lines = _heading(options.model, geometry, profile, options.tier)
        for length in lengths:
            lines += ["", *_lines(rows, options.method, length, geometry)]
        print("\n".join(lines))
    return 0


def _model(model: str, dtype: str) -> tuple[ModelGeometry, int]:
    """Its sizes and its longest context."""
    quiet_libraries()
    from mii_hcache.engine.config_geometry import dtype_of_config, geometry_of_config, read_config

    config = read_config(model)
    geometry = geometry_of_config(config, dtype_of_config(config) if dtype == "auto" else dtype)
    return geometry, int(getattr(config, "max_position_embeddings", None) or 1 << 20)


def _lengths(asked: str | None, context_tokens: int) -> tuple[int, ...]:
    """Whole spans: the rest of a history is prefilled with the new prompt."""
    if asked is None:
        return lengths_up_to(context_tokens)
    try:
        lengths = [int(part) // SPAN_TOKENS * SPAN_TOKENS for part in asked.split(",")]
    except ValueError:
        raise ConfigError(f"--tokens must be numbers with commas between them, got {asked!r}") from None
    if min(lengths) < SPAN_TOKENS:
        raise ConfigError(f"--tokens must be at least {SPAN_TOKENS} each, got {asked!r}")
    return tuple(dict.fromkeys(lengths))


def _rows(geometry: ModelGeometry, cost: LayerCost, lengths: Sequence[int], tile_tokens: int) -> list[_Row]:
    """Every method at every length; what is stored is one plan for all of them."""
    rows = []
    for name, method in METHODS.items():
        stored = plan_storage(name, geometry, cost, lengths=lengths, tile_tokens=tile_tokens)
        num_bytes = stored.bytes_per_token(geometry)
        for length in lengths:
            restored = method.restore(cost, stored.runs(length // SPAN_TOKENS), length, tile_tokens, None)
            rows.append(_Row(stored=stored, restored=restored, bytes_per_token=num_bytes))
    return rows


def _at(rows: Sequence[_Row], method: str, length: int) -> tuple[_Row, list[_Row]]:
    """The chosen method's row of a length, and all of that length, the fastest first."""
    here = sorted(
        (row for row in rows if row.restored.num_tokens == length), key=lambda row: row.restored.timeline.makespan_s
    )
    (chosen,) = (row for row in here if row.stored.method == method)
    return chosen, here


def _to_dict(rows: Sequence[_Row], method: str, length: int) -> dict[str, Any]:
    chosen, here = _at(rows, method, length)
    return {**chosen.to_dict(), "alternatives": [row.to_dict() for row in here if row is not chosen]}


def _heading(model: str, geometry: ModelGeometry, profile: Profile, tier: str | None) -> list[str]:
    tier = tier or next(iter(profile.tiers), None)
    return [
        f"{model}: {geometry.num_layers} layers of {geometry.hidden_size}, {geometry.num_heads} heads "
        f"({geometry.num_kv_heads} for K and V) of {geometry.head_size}, {geometry.dtype}",
        f"profile {profile.name}{f', tier {tier}' if tier else ''}: {profile.description}",
    ]


def _lines(rows: Sequence[_Row], method: str, length: int, geometry: ModelGeometry) -> list[str]:
    chosen, here = _at(rows, method, length)
    header = [
        "  method",
        "stored",
        "per token",
        "RE tokens",
        "RE layers",
        "IO ms",
        "compute ms",
        "total ms",
        "bubble",
        "tokens/s",
    ]
    lines = [
        f"{length:,} tokens, {method}: {_sentence(chosen.restored, chosen.stored, geometry)}",
        table(header, [row.cells(method) for row in here], left=2),
    ]
    notes = [f"{row.stored.method}: {row.stored.note}" for row in here if row.stored.note]
    return [*lines, *notes]


def _sentence(plan: RestorePlan, stored: StoragePlan, geometry: ModelGeometry) -> str:
    """The plan in words."""
    if stored.method == "ideal":
        return "nothing to do"
    if plan.is_prefill:
        return "prefill everything"
    parts = [f"recompute the first {plan.recompute_tokens:,} tokens; for the others"] if plan.recompute_tokens else []
    if plan.recompute_layers == 1:
        parts.append("project layer 0 from the embedding,")
    elif plan.recompute_layers:
        parts.append(f"recompute the first {plan.recompute_layers} layers,")
    num_read = geometry.num_layers - plan.recompute_layers
    return " ".join([*parts, f"read {num_read} layers"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mii_hcache plan",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model", required=True, metavar="PATH", help="folder with a config.json, or that file, or a hub id"
    )
    parser.add_argument(
        "--tokens", metavar="N,N", help="lengths of histories, rounded down to 64 (default: 1024,4096,16384)"
    )
    parser.add_argument("--profile", metavar="NAME_OR_JSON", help="what the machine can do (see below)")
    parser.add_argument("--tier", metavar="NAME", help="where state is read from: file or memory (default: the first)")
    parser.add_argument("--method", default="auto", metavar="NAME", help="one of those below (default: auto)")
    parser.add_argument("--dtype", default="auto", choices=DTYPE_NAMES, help="default: the config's own")
    parser.add_argument(
        "--tile-tokens",
        type=int,
        default=_DEFAULT_TILE_TOKENS,
        metavar="N",
        help=f"tokens of a layer that are read and projected at once (default: {_DEFAULT_TILE_TOKENS})",
    )
    add_state_dir(parser, "where a measured profile is looked for")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON: an object, or a list of them")
    return parser
