"""The overview of all items, generated: the paper's number, ours, how we got it, whether they agree and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from experiments.common.here import comparable, paper_absolute, paper_comparable
from experiments.common.item import Check, Item, numbers_verdict, typical_difference
from experiments.common.rows import Row

_HEAD = """# The paper's figures and tables, regenerated

Output only: `scripts/reproduce.sh` writes this folder from the results that `experiments/` keeps, and nothing else.
Left the paper's published numbers, in the middle ours, right the difference. How a number was obtained is part of it:
**measured** on the machine that its row names, **emulated** (measured with a throttled resource), or **simulated** (the
real planner on a cost model of the paper's machines: no GPU was used). Nothing simulated is evidence that the hardware
does it.

*Agrees*: `yes` when every number is within 10 % of what the paper's text claims (1 % where it claims a few per
cent), `partly` when some are (of a typical number: within 25 %), `no` else. A range of ratios is over all panels and
points of the figure; a typical difference is the median over its numbers, without those that are inputs. What ran on
the machine at hand is another model on another machine, so it is compared relative to one method: how many times as
long the others take.

| | the paper's claim | paper's text | paper's figure | ours | how | agrees |
|---|---|---|---|---|---|---|
"""

_BEYOND = """## Beyond the paper

| | what it says | how |
|---|---|---|
"""


def overview(
    items: Sequence[Item], rows: Mapping[str, Sequence[Row]], images: Sequence[str], checkout: str = ".."
) -> str:
    """Markdown. `checkout`: the way to the repository from the folder that the page goes to."""
    of_paper = [item for item in items if not item.is_beyond]
    beyond = [item for item in items if item.is_beyond]
    lines = [line for item in of_paper for line in _table_lines(item, rows[item.folder])]
    text = _HEAD + "\n".join(lines) + "\n\n"
    if beyond:
        text += _BEYOND + "\n".join(_beyond_line(item, rows[item.folder]) for item in beyond) + "\n\n"
    return text + "\n".join(_section(item, rows[item.folder], images, checkout) for item in items)


def _table_lines(item: Item, ours: Sequence[Row]) -> list[str]:
    published = paper_absolute(item)
    link = f"[{item.key}](#{item.key})"
    lines = []
    for check in item.checks:
        how = _how(row for row in ours if row.panel in check.panels)
        lines.append(
            f"| {link} | {check.text} | {_range(check)} | {_span(check, published)} | {_span(check, ours)} "
            f"| {how} | {check.verdict(ours)} |"
        )
    paper, mine = paper_comparable(item), comparable(item, ours)
    for is_here, claim in ((False, item.claim), (True, f"{item.claim}: on the machine at hand, relative")):
        group = [row for row in mine if item.is_here(row) == is_here and not item.is_reference(row)]
        difference = typical_difference(item, paper, group)
        if difference is not None:
            typical = f"typically {difference:.0%} off"
            lines.append(f"| {link} | {claim} | | | {typical} | {_how(group)} | {numbers_verdict(difference)} |")
    if not lines:
        how = _how(ours)
        lines.append(
            f"| {link} | {item.claim} | | | {'see the image' if how != '-' else _first_note(ours)} | {how} | |"
        )
    missing = dict.fromkeys(row.note for row in ours if row.y is None and row.x == "GPU")
    lines += [f"| {link} | the same on a GPU | | | {note} | - | |" for note in missing]
    return lines


def _beyond_line(item: Item, ours: Sequence[Row]) -> str:
    how = _how(ours)
    return f"| [{item.key}](#{item.key}) | {item.claim} | {how if how != '-' else _first_note(ours)} |"


def _how(rows: Iterable[Row]) -> str:
    return ", ".join(dict.fromkeys(row.how for row in rows if row.y is not None)) or "-"


def _first_note(rows: Sequence[Row]) -> str:
    return next((row.note for row in rows if row.y is None), "not run yet")


def _range(check: Check) -> str:
    return f"{check.low:g}" if check.low == check.high else f"{check.low:g}-{check.high:g}"


def _span(check: Check, rows: Sequence[Row]) -> str:
    ratios = check.ratios(rows)
    if not ratios:
        return "-"
    low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
    return low if low == high else f"{low}-{high}"


def _section(item: Item, ours: Sequence[Row], images: Sequence[str], checkout: str) -> str:
    names = {panel.image or item.folder for panel in item.panels} or {item.folder}
    pictures = [f"![{item.title}]({name})" for name in images if name.removesuffix(".png") in names]
    machines = ", ".join(dict.fromkeys(row.machine for row in ours if row.machine))
    notes = [check.why for check in item.checks if check.why] + ([item.why] if item.why else [])
    paragraphs = [
        f'<a id="{item.key}"></a>\n## {item.title}',
        *pictures,
        f"How: {item.how}" + (f" On the machine at hand: {item.here}" if item.here else ""),
        *([f"Machines: {machines}."] if machines else []),
        *(f"- {note}" for note in notes),
        f"Run: `scripts/reproduce.sh {item.key}`; [its folder]({checkout}/experiments/{item.folder}/README.md).",
    ]
    return "\n\n".join(paragraphs) + "\n"
