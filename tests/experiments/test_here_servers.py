"""What figures 4, 9, 10 and 15 ask of servers on the machine at hand: decided before any is started."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments.common import leval_here
from experiments.common.item import Context
from experiments.common.load_summary import Objective, summary_of
from experiments.common.models import MODELS
from experiments.common.runner import item_of
from experiments.common.served import Served
from experiments.fig04_overhead import here as fig04
from experiments.fig09_sharegpt import here as fig09
from experiments.fig15_gpu_reuse import here as fig15

SMALL = Context(scale="small")


@pytest.fixture
def bench(monkeypatch):
    for module in (fig09, fig15, leval_here):
        monkeypatch.setattr(module, "model_folder", lambda name, folder: Path(name))
    made = SimpleNamespace(model="250m", machine="here", read_bytes_per_s=lambda deployment: 3e8)
    for module in (fig04, fig09, fig15):
        monkeypatch.setattr(module, "bench_of", lambda context: made)
    return made


def served(series: str, rate: float | None = 2.5e8) -> Served:
    return Served(model_dir=Path("m"), series=series, num_blocks=9, read_bytes_per_s=rate)


def test_only_methods_that_read_are_slowed_down():
    for series, method in (("HCache", "hcache"), ("KV Offload", "kv"), ("Auto", "auto")):
        one = served(series)
        assert one.how == "emulated" and one.arguments()[-2:] == ["--emulate-read-speed", "250000000"]
        assert one.arguments()[one.arguments().index("--method") + 1] == method
    for one in (served("Recomputation"), served("Ideal"), served("HCache", rate=None)):
        assert one.how == "measured" and "--emulate-read-speed" not in one.arguments()


def test_every_method_gets_the_same_load_at_the_papers_rates(bench):
    scale = fig09.SCALES["small"]
    loads = fig09.loads_of(scale, slower=2.0)
    assert [*loads] == list(scale.loads)
    assert loads == fig09.loads_of(scale, slower=2.0)
    rounds = [[session.rounds for session in load.sessions] for load in loads.values()]
    assert rounds[0] == rounds[1] == rounds[2]
    assert len({load.name for load in loads.values()}) == 3
    slowest, *_, fastest = loads.items()
    assert fastest[1].sessions[-1].start_s == pytest.approx(
        slowest[1].sessions[-1].start_s * slowest[0] / fastest[0]
    )  # x is the paper's rate
    slower = fig09.loads_of(scale, slower=4.0)[slowest[0]]
    assert slower.sessions[-1].start_s == pytest.approx(2 * slowest[1].sessions[-1].start_s)


def test_everything_stays_resident_for_ideal_only(bench):
    scale = fig09.SCALES["small"]
    loads = list(fig09.loads_of(scale, slower=1.0).values())
    ideal, hcache = (fig09.server_for(bench, scale, series, loads) for series in ("Ideal", "HCache"))
    ends = [session.rounds[-1] for session in loads[0].sessions]
    tokens = [one.history_tokens + one.prompt_tokens + one.output_tokens for one in ends]
    assert ideal.keep == "lru" and 16 * ideal.num_blocks >= 2 * sum(tokens)
    assert hcache.keep == "none" and 16 * hcache.num_blocks >= 4 * max(tokens)


def test_a_run_without_an_answer_is_a_missing_number(bench):
    summary = summary_of([], 0.5, Objective(ttft_s=1.0, tbt_s=1.0))
    rows = list(fig09.rows_of(bench, served("HCache"), 0.4, summary, "a setting"))
    assert [row.y for row in rows] == [None, None] and all("no answer" in row.note for row in rows)


def test_the_pool_holds_some_contexts(bench):
    requests = fig15.requests_of(SMALL)
    assert requests == fig15.requests_of(SMALL) and [*requests] == [*fig15.ALPHAS]
    contexts = {one.context: one.history_tokens for some in requests.values() for one in some}
    pool = fig15.pool_tokens(SMALL)
    assert max(contexts.values()) < pool < sum(contexts.values()) / 4

    def favourite_share(x: str) -> float:
        asked = [one.context for one in requests[x]]
        return max(map(asked.count, asked)) / len(asked)

    assert favourite_share("2.0") > 0.4 > favourite_share("Uniform")


def test_what_reads_nothing_runs_once_for_all_balances(bench):
    keys = [cell.key for cell in fig04.cells(SMALL)]
    assert sorted(keys) == sorted(
        ["Recomputation", "Ideal", *(f"{series} {model}" for series in ("KV Offload", "HCache") for model in MODELS)]
    )


def test_lengths_are_the_papers_shortened(bench):
    questions = leval_here.questions_of(SMALL)
    assert questions["Paper Assistant"].history_tokens == pytest.approx(10603.5 / 4, abs=1)
    assert len({one.context for one in questions.values()}) == len(questions) == 3


@pytest.mark.parametrize("folder", ["fig04_overhead", "fig09_sharegpt", "fig10_leval", "fig15_gpu_reuse"])
def test_the_papers_panels_stand_beside(folder):
    item = item_of(folder)
    panels = {panel.key: panel for panel in item.panels}
    here = [panel for panel in item.panels if panel.here_of is not None]
    assert here and item.here
    for panel in here:
        assert panel.here_of in panels and panels[panel.here_of].here_of is None
    checked = {key for check in item.checks for key in check.panels if "this machine" in check.text}
    assert checked == {panel.key for panel in here}
