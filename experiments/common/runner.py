"""Runs items one after the other, draws them, and writes the overview. The entry of `scripts/reproduce.sh`.

    python -m experiments.common.runner --scale smoke all
    python -m experiments.common.runner --scale small --data DIR --record fig11 tab03

An item computes (`run.py`: arithmetic, simulation, files) and some also run the real engine on the machine at hand
(`here.py`). Results go to `--out` (build/reproduce/SCALE): ITEM.jsonl, ITEM-here.jsonl, and PNG files beside them. With
`--record` they go where the repository keeps them instead: `experiments/ITEM/results.jsonl`, `here-SCALE.jsonl` and
`paper_figs`, with the overview.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from experiments.common.item import Cell, Context, Item
from experiments.common.report import overview
from experiments.common.rows import ROOT, Row, provenance, read_rows, stamped, write_rows
from experiments.common.workloads import MissingData, data_folder
from mii_hcache.config import quiet_libraries

SCALES = ("smoke", "small", "paper")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where results and images of a run go."""

    out: Path
    is_record: bool

    def rows_of(self, item: Item) -> Path:
        """What the item computes."""
        return (
            ROOT / "experiments" / item.folder / "results.jsonl" if self.is_record else self.out / f"{item.key}.jsonl"
        )

    def here_of(self, item: Item, scale: str) -> Path:
        """What it ran on the machine at hand."""
        if self.is_record:
            return ROOT / "experiments" / item.folder / f"here-{scale}.jsonl"
        return self.out / f"{item.key}-here.jsonl"

    def read(self, item: Item) -> list[Row]:
        """All that is there. Where a GPU's numbers are recorded, they stand instead of a CPU's."""
        here = [read_rows(self.here_of(item, scale)) for scale in ("small", "paper")]
        if not self.is_record:
            del here[1]  # the same file
        measured = {row.panel for row in here[-1] if row.y is not None}
        kept = [row for rows in here[:-1] for row in rows if row.panel not in measured]
        return read_rows(self.rows_of(item)) + kept + here[-1]

    @property
    def images(self) -> Path:
        """Their folder."""
        return ROOT / "paper_figs" if self.is_record else self.out


def folders() -> list[str]:
    """Every item: figures, then tables, in the paper's order, then pages beyond it."""
    found = (path.parent.name for path in (ROOT / "experiments").glob("*/config.py"))
    return sorted(found, key=lambda name: (not name.startswith("fig"), not name.startswith("tab"), name))


def item_of(folder: str) -> Item:
    """The item that lives in a folder."""
    item: Item = import_module(f"experiments.{folder}.config").ITEM
    return item


def chosen(names: Sequence[str]) -> list[str]:
    """Folders by item key, by folder, or all. Raises SystemExit for an unknown name."""
    known = folders()
    if not names or "all" in names:
        return known
    by_name = {key: folder for folder in known for key in (folder, folder.split("_")[0])}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise SystemExit(
            f"unknown item {unknown[0]!r}; there are: all, {', '.join(name.split('_')[0] for name in known)}"
        )
    return [by_name[name] for name in names]


def run(item: Item, context: Context, place: Place) -> str:
    """Fresh rows in their file. Returns what to say of it. Raises MissingData."""
    measure: Callable[[Context], Iterable[Row]] = import_module(f"experiments.{item.folder}.run").measure
    rows = stamped(measure(context))
    write_rows(place.rows_of(item), rows)
    return f"{sum(row.y is not None for row in rows)} numbers"


def has_here(item: Item) -> bool:
    """Whether the item runs something on the machine at hand."""
    return (ROOT / "experiments" / item.folder / "here.py").is_file()


def run_here(item: Item, context: Context, place: Place, progress: Callable[[str], None]) -> str:
    """The same for the machine at hand. A run of the same commit that was stopped goes on behind its last cell."""
    make: Callable[[Context], Sequence[Cell]] = import_module(f"experiments.{item.folder}.here").cells
    cells, path = make(context), place.here_of(item, context.scale)
    unfinished = path.with_suffix(".unfinished.jsonl")
    _, commit = provenance()
    done = [row for row in read_rows(unfinished) if row.commit == commit]
    kept, since_s, num_run = {row.cell for row in done}, time.monotonic(), 0
    for idx, cell in enumerate(cells):
        if cell.key in kept:
            continue
        passed_s = time.monotonic() - since_s
        left = f", {passed_s / num_run * (len(cells) - idx):.0f} s left" if num_run else ""
        progress(f"[{'#' * (20 * idx // len(cells)):20}] {idx}/{len(cells)} {cell.key}{left}")
        done += [replace(row, cell=cell.key) for row in stamped(cell.measure())]
        write_rows(unfinished, done)
        num_run += 1
    write_rows(path, done)
    unfinished.unlink(missing_ok=True)
    resumed = f" ({len(cells) - num_run} cells from before)" if num_run < len(cells) else ""
    return f"{sum(row.y is not None for row in done)} numbers of this machine{resumed}"


def draw(item: Item, place: Place) -> str:
    """The item's images from its rows. Returns what to say of it."""
    if find_spec("matplotlib") is None:
        return "no plot: matplotlib is not installed (pip install matplotlib)"
    from experiments.common.plotting import save

    plot = import_module(f"experiments.{item.folder}.plot")
    return ", ".join(path.name for path in save(plot.draw(place.read(item)), place.images))


def main(argv: Sequence[str] | None = None) -> int:
    """Status 1 when an item failed; one without its data is skipped, not failed."""
    parser = argparse.ArgumentParser(
        prog="scripts/reproduce.sh", description="Regenerate the paper's figures and tables."
    )
    parser.add_argument("items", nargs="*", help="fig11, tab03, ... or all (default)")
    parser.add_argument("--scale", choices=SCALES, default="smoke", help="how much: seconds, a minute, all (minutes)")
    parser.add_argument("--data", type=Path, help="folder with the published data sets (else $MII_HCACHE_DATA)")
    parser.add_argument("--model", help="folder of real weights, for exactness (else $MII_HCACHE_MODEL)")
    parser.add_argument("--out", type=Path, help="results and images (default: build/reproduce/SCALE)")
    parser.add_argument(
        "--record",
        action="store_true",
        help="replace the repository's own results and paper_figs: what is computed in full, what runs on this machine "
        "at the scale (small, or paper on a GPU)",
    )
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--only-here", action="store_true", help="only what runs on this machine")
    parts.add_argument("--no-here", action="store_true", help="only what is computed")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--no-plots", action="store_true", help="results only")
    only.add_argument("--only-plots", action="store_true", help="images from results that are there")
    options = parser.parse_args(argv)
    quiet_libraries()
    if options.record and options.scale == "smoke" and not options.no_here and not options.only_plots:
        parser.error("--record keeps no smoke results of this machine: add --scale small, or --no-here")
    if options.model:
        os.environ["MII_HCACHE_MODEL"] = options.model
    context = Context(scale=options.scale, data=data_folder(options.data))
    computed = replace(context, scale="paper") if options.record else context
    out = options.out or ROOT / "build" / "reproduce" / options.scale
    place = Place(out=out, is_record=options.record)
    names, status, started_s = chosen(options.items), 0, time.monotonic()
    for idx, folder in enumerate(names, 1):
        item, since_s = item_of(folder), time.monotonic()
        head = f"[{idx:2}/{len(names)}] {folder:<20} "
        progress = _progress(head)
        progress("")
        done: list[str] = []
        try:
            if not options.only_plots and not options.only_here:
                done.append(run(item, computed, place))
            if not options.only_plots and not options.no_here and has_here(item):
                done.append(run_here(item, context, place, progress))
            if not options.no_plots:
                done.append(draw(item, place))
            words = f"{time.monotonic() - since_s:6.1f} s  {'; '.join(done)}"
        except MissingData as reason:
            words = f"skipped: {reason}"
        except Exception as error:
            status = 1
            words = f"FAILED: {type(error).__name__}: {error}"
        print(f"{_CLEAR}{head}{words}", flush=True)
    write_overview(place)
    print(f"{len(names)} items, {time.monotonic() - started_s:.1f} s: {place.images}")
    return status


_CLEAR = "\r\x1b[K" if sys.stdout.isatty() else ""


def _progress(head: str) -> Callable[[str], None]:
    """Rewrites the line on a terminal; elsewhere only the end of an item is said."""

    def say(words: str) -> None:
        if _CLEAR:
            print(f"{_CLEAR}{head}{words}", end="", flush=True)

    return say


def write_overview(place: Place) -> None:
    """README.md beside the images, from all rows that are there."""
    place.images.mkdir(parents=True, exist_ok=True)
    items = [item_of(folder) for folder in folders()]
    rows = {item.folder: place.read(item) for item in items}
    images = sorted(path.name for path in place.images.glob("*.png"))
    (place.images / "README.md").write_text(
        overview(items, rows, images, os.path.relpath(ROOT, place.images)), encoding="utf-8"
    )


if __name__ == "__main__":
    sys.exit(main())
