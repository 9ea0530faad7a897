"""Tables and images from the rows of a run, and from nothing else.

    python -m experiments.gpu_restore.report --rows build/gpu_restore/rows.jsonl --out build/gpu_restore
    python -m experiments.gpu_restore.report            # from results.jsonl here into paper_figs/

Without rows it says that nothing was measured yet. Rows of a CPU show that everything runs; recorded they are refused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from experiments.common.rows import ROOT, Row
from experiments.gpu_restore.ledger import CELL, FAILED, SKIPPED, whole_rows
from experiments.gpu_restore.targets import PREDICTED_MS, Numbers, Verdict, verdicts

RECORDED = Path(__file__).with_name("results.jsonl")
NAME = "gpu_restore"
_NOTHING = "**Not yet measured**: nothing of this has run on a GPU. `scripts/gpu_check.sh` runs it."


def markdown(rows: Sequence[Row]) -> str:
    """The whole report."""
    numbers = Numbers(rows)
    parts = ["# Restoring on a GPU: measured, beside what the machine can do", *_about(rows), *_targets(verdicts(rows))]
    if rows:
        parts += [
            *_gate(rows),
            *_ceilings(rows),
            *_restores(rows, numbers, "restore"),
            *_restores(rows, numbers, "emulated"),
        ]
        parts += [*_first_tokens(rows, numbers), *_decoding(rows, numbers), *_speeds(rows), *_left(rows)]
    parts += _predictions(numbers)
    return "\n\n".join(parts) + "\n"


def _about(rows: Sequence[Row]) -> Iterator[str]:
    if not rows:
        yield _NOTHING
        return
    one = rows[0]
    versions = ", ".join(f"{name} {version}" for name, version in one.versions.items())
    yield f"{one.machine}. {versions}; commit {one.commit}. Random weights in the shapes of the models."
    found = [f"{row.series}: {row.note}" for row in rows if row.panel == "machine"]
    if found:
        yield "As found: " + "; ".join(found) + "."


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(
        ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(line) + " |" for line in lines)]
    )


def _targets(found: Sequence[Verdict]) -> Iterator[str]:
    yield "## Targets"
    lines = []
    for one in found:
        value = "-" if one.value is None else f"{one.value:.3f}"
        limit = f"{'>=' if one.is_least else '<='} {one.limit:g}"
        word = one.word.upper() if one.word == "missed" else one.word
        lines.append((one.target, one.place, limit, value, word))
    yield _table(("target", "where", "limit", "measured", "verdict"), lines)


def _gate(rows: Sequence[Row]) -> Iterator[str]:
    found = [row for row in rows if row.panel == "gate" and row.y is not None]
    if not found:
        return
    yield "## Correctness, before anything was timed"
    bounds = {(row.series.removesuffix(" noise"), row.x): row.y for row in found if row.series.endswith(" noise")}
    lines = []
    for (series, x), bound in bounds.items():
        own = [row for row in found if row.series.startswith(f"{series} ") and row.x == x]
        ways = [row for row in own if not row.series.endswith(" noise")]
        worst = max((row.y or 0.0 for row in ways), default=0.0)
        lines.append((series, f"{x:,}", f"{bound:.4g}", f"{worst:.4g}" if ways else "no whole span", str(len(ways))))
    yield _table(("engine", "tokens", "batch splits differ by", "restored differ by, at most", "ways"), lines)


def _ceilings(rows: Sequence[Row]) -> Iterator[str]:
    panels = ("copy", "copies", "product", "attention", "scatter", "placing", "store", "both")
    found = [row for row in rows if row.panel in panels and row.y is not None]
    if not found:
        return
    yield "## What the machine can do"
    lines = []
    for row in found:
        assert row.y is not None
        factor, unit = {"bytes/s": (1e-9, " GB/s"), "FLOP/s": (1e-12, " TFLOP/s")}.get(row.unit, (1.0, ""))
        at = f"{row.x:,}" if isinstance(row.x, int) else str(row.x)
        lines.append((row.panel, row.series, at, f"{factor * row.y:.4g}{unit}"))
    yield _table(("what", "of", "at", "median"), lines)


def _ms(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{1e3 * value:.{digits}f}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _restores(rows: Sequence[Row], numbers: Numbers, panel: str) -> Iterator[str]:
    places = [(row.series, row.x, row.note) for row in rows if row.panel == panel and row.y is not None]
    if not places:
        return
    if panel == "restore":
        yield "## Restores from host memory"
    else:
        yield "## Restores from an emulated device (throttled reads: **emulated**, not measured)"
    yield (
        "Bound: the bytes of the plan over the fastest copy, or its FLOPs over the fastest product and attention, "
        "whichever is longer. Store alone: the same bytes by the readers from the store into pinned memory."
    )
    lines = []
    for series, x, note in sorted(places, key=lambda place: (place[0].split()[0], float(place[1]))):
        model, method = series.rsplit(" ", 1)
        here = {name: (panel + name, series, x) for name in ("", ".min", ".p90", ".device", ".bound", ".read", ".flop")}
        took = numbers.get(*here[""])
        read, flop = numbers.get(*here[".read"]) or 0.0, numbers.get(*here[".flop"]) or 0.0
        assert took is not None
        others = [
            _times(numbers.ratio((panel, f"{model} {other}", x), here[""])) for other in ("kv", "cake", "recompute")
        ]
        predicted = PREDICTED_MS.get((model, method, int(x))) if panel == "restore" else None
        lines.append(
            (
                model,
                method,
                f"{x:,.0f}" if panel == "restore" else f"{x:g} GB/s",
                f"{_ms(took)} [{_ms(numbers.get(*here['.min']))}, {_ms(numbers.get(*here['.p90']))}]",
                _ms(numbers.get(*here[".device"])),
                "-" if predicted is None else f"{predicted[0]:g} / {predicted[1]:g}",
                _ms(numbers.get(f"{panel}.planned", series, x)),
                f"{read / took / 1e9:.1f}",
                f"{flop / took / 1e12:.0f}",
                _ms(numbers.get(*here[".bound"])),
                _times(numbers.ratio(here[""], here[".bound"])),
                _ms(numbers.get(f"{panel}.store-bound", series, x)),
                *others,
                note.split("; ")[0].split(", ", 1)[-1],
            )
        )
    head = (
        "model",
        "method",
        "tokens" if panel == "restore" else "reads at",
        "ms, median [min, p90]",
        "device",
        "predicted: model / engine",
        "planned",
        "GB/s",
        "TFLOP/s",
        "bound, ms",
        "over bound",
        "store alone, ms",
        "kv /",
        "cake /",
        "recompute /",
        "plan",
    )
    yield _table(head, lines)


def _first_tokens(rows: Sequence[Row], numbers: Numbers) -> Iterator[str]:
    found = [row for row in rows if row.panel == "ttft" and row.y is not None]
    if not found:
        return
    yield "## First token behind a restored history"
    lines = []
    for row in found:
        model, method = row.series.rsplit(" ", 1)
        ideal = numbers.ratio(("ttft", row.series, row.x), ("ttft", f"{model} ideal", row.x))
        kv = numbers.ratio(("ttft", f"{model} kv", row.x), ("ttft", row.series, row.x))
        p90 = numbers.get("ttft.p90", row.series, row.x)
        lines.append((model, method, f"{row.x:,}", f"{_ms(row.y)} [p90 {_ms(p90)}]", _times(ideal), _times(kv)))
    yield _table(("model", "method", "history", "ms, median", "over ideal", "kv /"), lines)


def _decoding(rows: Sequence[Row], numbers: Numbers) -> Iterator[str]:
    found = [row for row in rows if row.panel == "decode" and row.y is not None]
    if not found:
        return
    yield "## Time between tokens"
    lines = []
    for row in found:
        p99 = numbers.get("decode.p99", row.series, row.x)
        lines.append((row.series, str(row.x), _ms(row.y, 3), _ms(p99, 3), row.note))
    yield _table(("what", "batch", "p50, ms", "p99, ms", "how"), lines)


def _speeds(rows: Sequence[Row]) -> Iterator[str]:
    found = [row for row in rows if row.panel.startswith("speed.")]
    if not found:
        return
    yield "## The engine beside others, same weights"
    lines = [
        (
            row.panel.removeprefix("speed."),
            row.series,
            f"{row.x:,}",
            "-" if row.y is None else f"{row.y:,.0f}",
            row.note,
        )
        for row in found
    ]
    yield _table(("what", "of", "context", "tokens/s", "how"), lines)


def _left(rows: Sequence[Row]) -> Iterator[str]:
    missing = [row for row in rows if row.panel in (SKIPPED, FAILED)]
    took_s = sum(row.y or 0.0 for row in rows if row.panel == CELL)
    yield f"Cells took {took_s:.0f} s in all."
    if missing:
        yield "## Not measured"
        yield _table(("what", "why"), [(row.series, row.note) for row in missing])


def _predictions(numbers: Numbers) -> list[str]:
    lines = []
    for (model, method, tokens), (by_model, of_engine) in PREDICTED_MS.items():
        found = numbers.get("restore", f"{model} {method}", tokens)
        ratio = "-" if found is None else f"{1e3 * found / of_engine:.2f}"
        lines.append((model, method, f"{tokens:,}", f"{by_model:g}", f"{of_engine:g}", _ms(found), ratio))
    head = (
        "model",
        "method",
        "tokens",
        "predicted by the model, ms",
        "of the engine, ms",
        "measured, ms",
        "measured / engine",
    )
    return ["## Predicted before the first run", _table(head, lines)]


def main(argv: Sequence[str] | None = None) -> int:
    """Status 0; the text goes to `--out`/gpu_restore.md and to stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=RECORDED, help="default: what is recorded here")
    parser.add_argument("--out", type=Path, default=ROOT / "paper_figs", help="folder for the text and the images")
    options = parser.parse_args(argv)
    rows = list(whole_rows(options.rows))
    if options.rows == RECORDED and any("cuda" not in row.versions or "driver" not in row.versions for row in rows):
        raise SystemExit(f"{RECORDED} has rows that were not measured on a GPU: they are no results")
    text = markdown(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{NAME}.md").write_text(text, encoding="utf-8")
    print(text)
    if rows and find_spec("matplotlib") is None:
        print("no images: matplotlib is not installed (pip install matplotlib)")
    elif rows:
        from experiments.common.plotting import save
        from experiments.gpu_restore.plot import draw

        for path in save(draw(rows), options.out):
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
