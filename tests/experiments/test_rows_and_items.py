"""The schema of result rows, the paper's series, and every item's folder; three items end to end."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec

import pytest

from experiments.common import runner
from experiments.common.item import Check, Context, Match, matches
from experiments.common.paper import paper_rows, paper_value
from experiments.common.rows import ROOT, Row, read_rows, write_rows

FOLDERS = runner.folders()
ITEMS = [runner.item_of(folder) for folder in FOLDERS]


def row(**changes):
    return Row(**{"figure": "fig0", "series": "s", "x": 1, "y": 2.0, "unit": "s", "how": "simulated", **changes})


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"how": "guessed"}, "how must be one of"),
        ({"unit": ""}, "must be named"),
        ({"y": None}, "needs a note"),
        ({"y": float("nan")}, "must be finite"),
    ],
)
def test_a_row_that_could_mislead(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        row(**changes)


def test_rows_come_back(tmp_path):
    rows = [row(), row(x="A100", y=None, note="not yet"), row(versions={"python": "3"}, commit="abc")]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl") == rows
    assert read_rows(tmp_path / "none.jsonl") == []
    (tmp_path / "odd.jsonl").write_text(json.dumps({"figure": "fig0", "extra": 1}) + "\n")
    with pytest.raises(ValueError, match="exactly the fields"):
        read_rows(tmp_path / "odd.jsonl")


def test_the_papers_numbers():
    assert paper_value("fig12", "", "HCache", "A100 13B 4 SSD") == 50970.0
    assert paper_value("fig11", "d", "KV Offload", 4) == 46240.0
    assert paper_value("tab03", "", "HCache", "Llama2-7B") == 264 * 1024
    with pytest.raises(KeyError):
        paper_value("fig12", "", "HCache", "H200")
    for figure in ("fig09", "fig10", "fig11", "fig14", "fig15"):
        assert {one.how for one in paper_rows(figure)} == {"paper"}


def test_matching_interpolates_and_does_not_extrapolate():
    paper = [row(x=10, y=1.0, how="paper"), row(x=20, y=3.0, how="paper")]
    found = list(matches(paper, [row(x=15, y=4.0), row(x=30, y=4.0), row(x=20, y=None, note="not yet")]))
    assert found == [Match(panel="", series="s", x=15, paper=2.0, ours=4.0)]
    assert found[0].difference == 1.0


def test_a_check_judges_by_range_and_side():
    rows = [
        row(series=series, x=x, y=y) for series, x, y in (("a", 1, 1.5), ("b", 1, 1.0), ("a", 2, 9.0), ("b", 2, 1.0))
    ]
    check = Check(text="", numerator="a", denominator="b", low=1.3, high=1.6)
    assert check.ratios(rows) == [1.5, 9.0]
    assert check.verdict(rows) == "partly" and check.verdict(rows[:2]) == "yes" and check.verdict(rows[2:]) == "no"
    assert check.verdict([]) == "not yet measured"
    other_side = Check(text="", numerator="b@2", denominator="b@1", low=1.05, high=1.1)
    assert other_side.ratios(rows) == [1.0]
    slower = Check(text="", numerator="b@1", denominator="a@1", low=1.05, high=1.1)
    assert slower.verdict(rows) == "no"


@pytest.mark.parametrize("item", ITEMS, ids=FOLDERS)
def test_every_folder_is_complete(item):
    folder = ROOT / "experiments" / item.folder
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert all(f"**{part}.**" in text for part in ("Claim", "Setup", "Run", "Read"))
    assert (folder / "run.py").is_file() and (folder / "plot.py").is_file()
    assert (ROOT / "experiments" / f"run_{re.sub(r'(?<=[a-z])0', '', item.key)}.sh").stat().st_mode & 0o111
    series = {one.series for one in paper_rows(item.key)}
    named = {name.split("@")[0] for check in item.checks for name in (check.numerator, check.denominator)}
    assert all(check.low <= check.high for check in item.checks)
    assert {one.panel for one in paper_rows(item.key)} <= {panel.key for panel in item.panels}
    assert set(item.inputs) <= series and named <= series


@pytest.mark.parametrize("item", ITEMS, ids=FOLDERS)
def test_recorded_results_are_of_this_schema(item):
    for one in read_rows(ROOT / "experiments" / item.folder / "results.jsonl"):
        assert one.figure == item.key and one.how != "paper" and one.commit
        keys = {panel.key for panel in item.panels if panel.key != "here"}
        assert not keys or one.panel in keys


@pytest.mark.parametrize("item", ITEMS, ids=FOLDERS)
def test_what_ran_on_a_machine_says_where_and_how(item):
    for path in (ROOT / "experiments" / item.folder).glob("here-*.jsonl"):
        rows = read_rows(path)
        assert rows and runner.has_here(item)
        ways = {"measured", "emulated"} | ({"simulated"} if item.key == "simcheck" else set())
        for one in rows:
            assert one.figure == item.key and one.how in ways and one.commit and one.cell
            assert one.panel in {panel.key for panel in item.panels}
            assert one.y is None or one.machine


@pytest.mark.parametrize("key", ["fig11", "fig12", "tab03"])
def test_smoke(key, tmp_path, capsys):
    assert runner.main(["--scale", "smoke", "--no-plots", "--out", str(tmp_path), key]) == 0
    assert "1 items" in capsys.readouterr().out
    rows = read_rows(tmp_path / f"{key}.jsonl")
    assert rows and {one.how for one in rows} == {"simulated"} and all(one.y is not None for one in rows)
    assert f"[{key}](#{key})" in (tmp_path / "README.md").read_text()


def test_smoke_with_a_plot(tmp_path):
    if find_spec("matplotlib") is None:
        pytest.skip("matplotlib is not installed: results are tested, plots are not")
    assert runner.main(["--out", str(tmp_path), "tab03"]) == 0
    assert 1000 < (tmp_path / "tab03_storage.png").stat().st_size < 200_000


def test_an_item_without_its_data_is_skipped(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("MII_HCACHE_DATA", raising=False)
    assert runner.main(["--no-plots", "--out", str(tmp_path), "tab01"]) == 0
    assert "skipped: needs L-Eval" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="unknown item"):
        runner.main(["fig99"])


def test_the_scale_picks():
    assert Context(scale="small").pick(smoke=1, small=2, paper=3) == 2
