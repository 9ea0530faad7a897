"""Images of a run: restores over the length of a history with their bounds, first tokens, and the pace of decoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.common.plotting import STYLE
from experiments.common.rows import Row
from experiments.gpu_restore.targets import Numbers

NAMES: Mapping[str, str] = {
    "recompute": "Recomputation",
    "kv": "KV Offload",
    "cake": "Cake",
    "hidden": "HCache-O",
    "hcache": "HCache",
    "auto": "Auto",
    "ideal": "Ideal",
}
"""The colours that other figures give to our methods."""

MOST_RATIO = 4.0
"""What is further above its bound is not drawn: the table has it."""


def _length(num_tokens: float) -> str:
    return f"{num_tokens / 1024:g}k" if num_tokens >= 1024 else f"{num_tokens:g}"


def draw(rows: Sequence[Row]) -> dict[str, Figure]:
    """By the image's name. Only what was measured is drawn."""
    numbers = Numbers(rows)
    where = rows[0].machine if rows else ""
    found = {"gpu_restore": _restores(rows, numbers, where), "gpu_restore_pace": _paces(rows, numbers, where)}
    return {name: figure for name, figure in found.items() if figure is not None}


def _methods(numbers: Numbers, panel: str, model: str) -> dict[str, list[float]]:
    """x by method, sorted."""
    found: dict[str, list[float]] = {}
    for series, x in numbers.places(panel):
        name, _, method = series.rpartition(" ")
        if name == model and method in NAMES and isinstance(x, (int, float)):
            found.setdefault(method, []).append(x)
    return {method: sorted(found[method]) for method in NAMES if method in found}


def _models(numbers: Numbers, panel: str) -> list[str]:
    return list(dict.fromkeys(series.rpartition(" ")[0] for series, _ in numbers.places(panel)))


def _restores(rows: Sequence[Row], numbers: Numbers, where: str) -> Figure | None:
    """Time above, and how far above its bound below; a column for each model."""
    models = _models(numbers, "restore")
    if not models:
        return None
    figure, grid = pyplot.subplots(
        2, len(models), figsize=(3.4 * len(models) + 0.6, 5.2), squeeze=False, layout="constrained"
    )
    for column, model in enumerate(models):
        above, below = grid[0][column], grid[1][column]
        for method, lengths in _methods(numbers, "restore", model).items():
            series = f"{model} {method}"
            colour, marker, _ = STYLE[NAMES[method]]
            times = [1e3 * (numbers.get("restore", series, x) or 0.0) for x in lengths]
            above.plot(lengths, times, color=colour, marker=marker, markersize=3, linewidth=1, label=method)
            bounds = {x: numbers.get("restore.bound", series, x) for x in lengths}
            known = [x for x in lengths if bounds[x]]
            above.plot(known, [1e3 * (bounds[x] or 0.0) for x in known], color=colour, linewidth=0.8, linestyle=":")
            ratios = [numbers.ratio(("restore", series, x), ("restore.bound", series, x)) or 0.0 for x in known]
            below.plot(known, ratios, color=colour, marker=marker, markersize=3, linewidth=1)
        above.set_title(model, fontsize=9, loc="left")
        above.set_xscale("log", base=2)
        above.set_yscale("log")
        below.set_xscale("log", base=2)
        below.axhline(1.1, color="#777777", linewidth=0.8, linestyle="--")
        below.set_ylim(0, min(MOST_RATIO, below.get_ylim()[1]))
        below.set_xlabel("tokens")
        lengths = sorted({x for values in _methods(numbers, "restore", model).values() for x in values})
        for axes in (above, below):
            axes.set_xticks(lengths, [_length(x) for x in lengths])
            axes.minorticks_off()
    grid[0][0].set_ylabel("restore, ms (dotted: bound)")
    grid[1][0].set_ylabel(f"over its bound (target: 1.1; cut at {MOST_RATIO:g})")
    handles, names = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.suptitle(f"Restores from host memory, measured on {where}", fontsize=8)
    return figure


def _paces(rows: Sequence[Row], numbers: Numbers, where: str) -> Figure | None:
    models = _models(numbers, "ttft")
    batches = sorted({x for series, x in numbers.places("decode") if series.endswith(" saving")}, key=float)
    if not models and not batches:
        return None
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8.4, 3.2), layout="constrained")
    if models:
        _first_tokens(left, numbers, models[0])
    _saving(right, numbers, batches)
    figure.suptitle(f"Measured on {where}", fontsize=8)
    return figure


def _first_tokens(axes: Axes, numbers: Numbers, model: str) -> None:
    methods = _methods(numbers, "ttft", model)
    lengths = sorted({x for values in methods.values() for x in values})
    width = 0.8 / max(1, len(methods))
    for order, (method, values) in enumerate(methods.items()):
        colour, _, hatch = STYLE[NAMES[method]]
        left = [lengths.index(x) - 0.4 + (order + 0.5) * width for x in values]
        times = [1e3 * (numbers.get("ttft", f"{model} {method}", x) or 0.0) for x in values]
        axes.bar(left, times, width, color=colour, hatch=hatch, edgecolor="white", linewidth=0.3, label=method)
    axes.set_xticks(range(len(lengths)), [f"{x:,.0f}" for x in lengths])
    axes.set_yscale("log")
    axes.set_xlabel("history, tokens")
    axes.set_ylabel("first token, ms")
    axes.set_title(f"(a) {model}: restore and a short prompt", fontsize=8, loc="left")
    axes.legend(fontsize=6, frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.2))


def _saving(axes: Axes, numbers: Numbers, batches: Sequence[float | str]) -> None:
    model = next(iter(_models(numbers, "decode")), "").split(" ")[0]
    for statistic, colour, shift in (("", "#0072B2", -0.2), (".p99", "#56B4E9", 0.2)):
        heights = [
            100
            * (
                (
                    numbers.ratio(
                        (f"decode{statistic}", f"{model} saving", x), (f"decode{statistic}", f"{model} alone", x)
                    )
                    or 1.0
                )
                - 1
            )
            for x in batches
        ]
        places = [place + shift for place in range(len(batches))]
        axes.bar(places, heights, 0.36, color=colour, label=statistic.removeprefix(".") or "p50")
    for place, x in enumerate(batches):
        limit = 2.0 if x == 1 else 1.0
        axes.plot([place - 0.4, place + 0.4], [limit, limit], color="#D55E00", linewidth=1)
    axes.axhline(0, color="#777777", linewidth=0.8)
    axes.set_xticks(range(len(batches)), [str(x) for x in batches])
    axes.set_xlabel("batch")
    axes.set_ylabel("time between tokens, % more")
    axes.set_title("(b) what saving adds (line: target of the p50)", fontsize=8, loc="left")
    axes.legend(fontsize=6, frameon=False)
