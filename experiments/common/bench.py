"""The engine of a scale, on which methods race at the speed of some device.

Its bandwidth can be chosen by balance: reading K and V of a token then takes as long, over a layer's forward on this
machine, as on a platform of the paper, so that methods compare as they would there.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from experiments.common.checkpoints import make_model
from experiments.common.contenders import profile, race
from experiments.common.item import Cell, Context, Panel
from experiments.common.models import METHOD_OF, Deployment
from experiments.common.random_weights import random_engine
from experiments.common.rows import Row
from experiments.common.steps import prefill_s
from mii_hcache.core.cost import LayerCost
from mii_hcache.core.geometry import ChunkKind, ModelGeometry
from mii_hcache.engine.ragged_engine import HCacheEngine, build_engine
from mii_hcache.runtime.machine import device_name, num_usable_cpus

MODELS_DIR = Path(tempfile.gettempdir()) / "mii_hcache-models"
UNTHROTTLED = math.inf
PLATFORM_TOKENS = 1024
"""Length at which a platform's balance is taken."""


def emulated_bandwidth(token_s: float, geometry: ModelGeometry, deployment: Deployment) -> float:
    """Bytes per second at which K and V of a token take as long to read, over a layer's forward of a token on this
    machine (`token_s`), as on the deployment."""
    balance = deployment.cost.io_kv_s / deployment.cost.token_s(PLATFORM_TOKENS)
    return geometry.row_bytes(ChunkKind.KV) / (balance * token_s)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The engine of a scale, and how much is asked of it."""

    engine: HCacheEngine
    model: str
    num_tokens: int
    repeats: int

    @property
    def machine(self) -> str:
        """For rows."""
        return f"{device_name(self.engine.device)}, {num_usable_cpus()} cores, {self.model}"

    @property
    def is_gpu(self) -> bool:
        """Whether rates are a GPU's own."""
        return self.engine.device.type == "cuda"

    def read_bytes_per_s(self, deployment: Deployment) -> float:
        """On a GPU the platform's own rate, elsewhere the one of the same balance."""
        if self.is_gpu:
            return deployment.geometry.row_bytes(ChunkKind.KV) / deployment.cost.io_kv_s
        return emulated_bandwidth(_token_s(self), self.engine.geometry, deployment)

    def rows(
        self,
        figure: str,
        panel: Panel,
        x: float | str,
        deployment: Deployment,
        series: Sequence[str],
        num_tokens: int | None = None,
    ) -> Iterator[Row]:
        """A race of the series' methods, as restoration speeds (`panel.is_speed`) or seconds."""
        tokens = num_tokens or self.num_tokens
        rate = self.read_bytes_per_s(deployment)
        methods = [METHOD_OF.get(name, name) for name in series]
        outcomes = race(self.engine, methods, rate, tokens, repeats=self.repeats)
        for name, outcome in zip(series, outcomes, strict=True):
            planned = "" if outcome.planned_s is None else f", planned {1e3 * outcome.planned_s:.0f} ms"
            yield Row(
                figure=figure,
                panel=panel.key,
                series=name,
                x=x,
                y=tokens / outcome.restore_s if panel.is_speed else outcome.restore_s,
                unit="tokens/s" if panel.is_speed else "s",
                how="emulated",
                machine=self.machine,
                note=f"{tokens} tokens through reads of {rate / 1e6:.0f} MB/s, which emulates {deployment.platform}; "
                f"stored as {outcome.stored}; {1e3 * outcome.restore_s:.0f} ms{planned}, io {1e3 * outcome.io_s:.0f}, "
                f"compute {1e3 * outcome.compute_s:.0f}, bubble {1e3 * outcome.bubble_s:.0f}; "
                f"median of {len(outcome.restore_s_all)}",
            )


def bench_of(context: Context) -> Bench | None:
    """None at paper scale without a GPU."""
    if context.scale == "paper" and not torch.cuda.is_available():
        return None
    model, num_tokens, repeats = context.pick(
        smoke=("demo", 512, 1), small=("250m", 1024, 3), paper=("llama2-7b", 1024, 5)
    )
    return Bench(engine=_engine(model), model=model, num_tokens=num_tokens, repeats=repeats)


@lru_cache(maxsize=1)
def _engine(model: str) -> HCacheEngine:
    if model.startswith("llama2"):
        return random_engine(model, dtype="float16", num_blocks=1060)
    return build_engine(str(make_model(model, MODELS_DIR)), num_blocks=1060)


@lru_cache(maxsize=4)
def _token_s(bench: Bench) -> float:
    """Of a layer, from whole prefills: they vary less with what else runs than a profile's differences do."""
    return prefill_s(bench.engine, PLATFORM_TOKENS) / (PLATFORM_TOKENS * bench.engine.geometry.num_layers)


@lru_cache(maxsize=4)
def base_cost(bench: Bench) -> LayerCost:
    """Of an unthrottled store."""
    return profile(bench.engine, UNTHROTTLED)["memory"]


def throttled_cost(bench: Bench, read_bytes_per_s: float) -> LayerCost:
    """This machine's, with reads of that speed."""
    geometry = bench.engine.geometry
    return replace(
        base_cost(bench),
        io_hidden_s=geometry.row_bytes(ChunkKind.HIDDEN) / read_bytes_per_s,
        io_kv_s=geometry.row_bytes(ChunkKind.KV) / read_bytes_per_s,
        io_start_s=0.0,
        io_slowdown=1.0,
    )


def needs_gpu(figure: str, panels: Sequence[Panel]) -> list[Cell]:
    """The place that a GPU's numbers will take."""
    number = figure.removeprefix("fig").removeprefix("tab").lstrip("0")
    kind = figure[:3] if figure.startswith(("fig", "tab")) else ""
    script = f"experiments/run_{kind}{number}.sh --scale paper"
    row = {"series": "HCache", "x": "GPU", "y": None, "unit": "s", "how": "measured"}
    note = f"not yet measured: needs a GPU; run {script} there"

    def missing() -> Iterator[Row]:
        for panel in panels:
            yield Row(figure=figure, panel=panel.key, note=note, **row)  # type: ignore[arg-type]

    return [Cell(key="GPU", measure=missing)]
