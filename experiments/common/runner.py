"""Runs items one after the other, draws them, and writes the overview. The entry of `scripts/reproduce.sh`.

    python -m experiments.common.runner --scale smoke all
    python -m experiments.common.runner --scale paper --data DIR --record fig11 tab03

Results go to `--out` (build/reproduce/SCALE): ITEM.jsonl, and PNG files beside them. With `--record` they go where the
repository keeps them instead: `experiments/ITEM/results.jsonl` and `paper_figs`, with the overview.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from experiments.common.item import Context, Item
from experiments.common.report import overview
from experiments.common.rows import ROOT, Row, read_rows, stamped, write_rows
from experiments.common.workloads import MissingData, data_folder

SCALES = ("smoke", "small", "paper")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where results and images of a run go."""

    out: Path
    is_record: bool

    def rows_of(self, item: Item) -> Path:
        """The item's JSON lines."""
        return (
            ROOT / "experiments" / item.folder / "results.jsonl" if self.is_record else self.out / f"{item.key}.jsonl"
        )

    @property
    def images(self) -> Path:
        """Their folder."""
        return ROOT / "paper_figs" if self.is_record else self.out


def folders() -> list[str]:
    """Every item: figures, then tables, in the paper's order."""
    found = (path.parent.name for path in (ROOT / "experiments").glob("*/config.py"))
    return sorted(found, key=lambda name: (not name.startswith("fig"), name))


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


def draw(item: Item, place: Place) -> str:
    """The item's images from its rows. Returns what to say of it."""
    if find_spec("matplotlib") is None:
        return "no plot: matplotlib is not installed (pip install matplotlib)"
    from experiments.common.plotting import save

    plot = import_module(f"experiments.{item.folder}.plot")
    return ", ".join(path.name for path in save(plot.draw(read_rows(place.rows_of(item))), place.images))


def main(argv: Sequence[str] | None = None) -> int:
    """Status 1 when an item failed; one without its data is skipped, not failed."""
    parser = argparse.ArgumentParser(
        prog="scripts/reproduce.sh", description="Regenerate the paper's figures and tables."
    )
    parser.add_argument("items", nargs="*", help="fig11, tab03, ... or all (default)")
    parser.add_argument("--scale", choices=SCALES, default="smoke", help="how much: seconds, a minute, all (minutes)")
    parser.add_argument("--data", type=Path, help="folder with the published data sets (else $MII_HCACHE_DATA)")
    parser.add_argument("--out", type=Path, help="results and images (default: build/reproduce/SCALE)")
    parser.add_argument("--record", action="store_true", help="replace the repository's own results and paper_figs")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--no-plots", action="store_true", help="results only")
    only.add_argument("--only-plots", action="store_true", help="images from results that are there")
    options = parser.parse_args(argv)
    context = Context(scale=options.scale, data=data_folder(options.data))
    out = options.out or ROOT / "build" / "reproduce" / options.scale
    place = Place(out=out, is_record=options.record)
    names, status, started_s = chosen(options.items), 0, time.monotonic()
    for idx, folder in enumerate(names, 1):
        item, since_s = item_of(folder), time.monotonic()
        print(f"[{idx:2}/{len(names)}] {folder:<20} ", end="", flush=True)
        try:
            done = [] if options.only_plots else [run(item, context, place)]
            done += [] if options.no_plots else [draw(item, place)]
            print(f"{time.monotonic() - since_s:6.1f} s  {'; '.join(done)}")
        except MissingData as reason:
            print(f"skipped: {reason}")
        except Exception as error:
            status = 1
            print(f"FAILED: {type(error).__name__}: {error}")
    write_overview(place)
    print(f"{len(names)} items, {time.monotonic() - started_s:.1f} s: {place.images}")
    return status


def write_overview(place: Place) -> None:
    """README.md beside the images, from all rows that are there."""
    place.images.mkdir(parents=True, exist_ok=True)
    items = [item_of(folder) for folder in folders()]
    rows = {item.folder: read_rows(place.rows_of(item)) for item in items}
    images = sorted(path.name for path in place.images.glob("*.png"))
    (place.images / "README.md").write_text(overview(items, rows, images), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
