"""The simulator with measured steps, what its errors are, and one method for real."""

from __future__ import annotations

from dataclasses import replace

import pytest

from experiments.common.item import Context
from experiments.common.models import Deployment
from experiments.common.rows import Row
from experiments.common.servers import MeasuredServer
from experiments.common.serving import serve
from experiments.common.workloads import Round, Session
from experiments.simcheck import here
from experiments.simcheck.config import PAIRS, errors, ratios
from experiments.simcheck.plot import draw
from mii_hcache.core.cost import LayerCost
from mii_hcache.core.geometry import ModelGeometry

GEOMETRY = ModelGeometry(
    num_layers=4, hidden_size=256, num_heads=8, num_kv_heads=8, head_size=32, dtype="float32", ffn_weights=1
)
COST = LayerCost(io_hidden_s=1e-6, io_kv_s=2e-6, c_hidden_s=1e-6, c_token_s=6e-6, c_attention_s=1e-9)
SERVER = MeasuredServer(
    deployment=Deployment(model="mine", platform="here", cost=COST, basis="made up", shape=GEOMETRY),
    kv_capacity_tokens=4096,
    hbm_bytes_per_s=float("inf"),
    step_start_s=0.0,
    budget_tokens=256,
    prefills_s=((1, 0.020), (64, 0.040), (256, 0.160)),
    decodes_s=((1, 0.010), (4, 0.016)),
    context_s=1e-6,
    pair_s=2e-8,
)


@pytest.mark.parametrize(("rounds", "seconds"), [(1, 0.010), (2, 0.012), (4, 0.016), (8, 0.024)])
def test_decoding_costs_what_was_measured(rounds, seconds):
    assert SERVER.step_s(rounds, 0, []) == pytest.approx(seconds)
    assert SERVER.step_s(rounds, 2000, []) == pytest.approx(seconds + 2000 * 1e-6)


@pytest.mark.parametrize(("tokens", "seconds"), [(1, 0.020), (64, 0.040), (160, 0.100), (256, 0.160), (512, 0.320)])
def test_a_prefill_costs_what_was_measured(tokens, seconds):
    assert SERVER.step_s(0, 0, [(0, tokens)]) == pytest.approx(seconds)
    assert SERVER.step_s(0, 0, [(1000, tokens)]) == pytest.approx(seconds + 1000 * (1e-6 + 2e-8 * tokens))
    assert SERVER.step_s(4, 0, [(0, tokens)]) == pytest.approx(0.016 + seconds - 0.020)  # beside four that decode


def test_a_restore_beside_decoding_takes_its_share_only():
    """A tenth of the computing for restores makes a restore that computes only ten times as long."""
    busy = Session(start_s=0.0, rounds=(Round(history_tokens=0, prompt_tokens=1, output_tokens=2000),))
    other = Session(start_s=0.5, rounds=(Round(history_tokens=1280, prompt_tokens=1, output_tokens=2),))
    cost = replace(COST, io_hidden_s=1e-12, io_kv_s=2e-12, c_hidden_s=2e-4)
    server = replace(SERVER, deployment=replace(SERVER.deployment, cost=cost))
    times_s = []
    for share in (0.9, 0.1):
        done = serve(replace(server, restores_get=share), "HCache-O", [busy, other])
        times_s.append(next(one.ttft_s for one in done if one.round.history_tokens))
    assert times_s[1] / times_s[0] == pytest.approx(9.0, rel=0.1)


@pytest.mark.parametrize("series", ["Recomputation", "KV Offload", "HCache", "Ideal"])
def test_its_rounds_are_its_steps(series):
    session = Session(start_s=1.0, rounds=(Round(history_tokens=640, prompt_tokens=64, output_tokens=9),))
    (done,) = serve(SERVER, series, [session])
    assert done.ttft_s == pytest.approx(SERVER.first_token_s(series, 640, 64))
    assert done.tbt_s == pytest.approx(SERVER.step_s(1, 708, []), rel=0.01)
    if series == "Ideal":
        assert done.ttft_s == pytest.approx(0.040 + 640 * (1e-6 + 2e-8 * 64))
    if series == "KV Offload":
        assert done.ttft_s == pytest.approx(4 * 640 * 2e-6 + 0.040 + 640 * (1e-6 + 2e-8 * 64))


def row(panel: str, series: str, x: float, y: float | None) -> Row:
    return Row(figure="simcheck", panel=panel, series=series, x=x, y=y, unit="s", how="measured", note="hand-made")


def test_errors_are_of_the_measured_numbers():
    measured, simulated = PAIRS["between tokens"]
    rows = [
        *(row(measured, "HCache", x, y) for x, y in ((1.0, 2.0), (2.0, 2.0), (3.0, 4.0), (4.0, None))),
        *(row(simulated, "HCache", x, y) for x, y in ((1.0, 3.0), (2.0, 1.8), (3.0, 4.0), (4.0, 1.0))),
        row(simulated, "Ideal", 1.0, 9.0),
    ]
    assert ratios(rows, "between tokens") == pytest.approx(
        {("HCache", 1.0): 1.5, ("HCache", 2.0): 0.9, ("HCache", 3.0): 1.0}
    )
    (error,) = errors(rows)
    assert (error.what, error.count) == ("between tokens", 3)
    assert (error.typical, error.low, error.high) == pytest.approx((0.1, 0.9, 1.5))
    assert str(error) == "typically 10% off; 0.90 to 1.50 of measured, 3 numbers"
    (figure,) = draw(rows).values()
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[2] == "between tokens\n10% off" and titles[0] == "first token, median"


def test_one_method_for_real():
    """Both sides of every pair are there, and of one size: the simulator's numbers are seconds of this machine."""
    context = Context(scale="smoke")
    bench = here.bench_of(context)
    assert bench is not None
    scale = replace(here.scale_of(context), series=("KV Offload",), loads=(0.4,), think=0.0)
    rows = [*here.restores(bench, 512), *here.under_load(bench, scale, "KV Offload")]
    for what in PAIRS:
        values = ratios(rows, what)
        assert ("KV Offload", 512 if what == "restore alone" else 0.4) in values
        # milliseconds would be off by 1000; a machine that stands still for a second may be off by 50
        assert all(1 / 200 < value < 200 for value in values.values()), (what, values)
    assert {r.how for r in rows if r.panel in "bdfh"} == {"simulated"}
    assert {r.how for r in rows if r.panel in "aceg"} == {"emulated"}
