"""The overview of all items, generated: the paper's number, ours, how we got it, whether they agree and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experiments.common.item import Check, Item, numbers_verdict, typical_difference
from experiments.common.paper import paper_rows
from experiments.common.rows import Row

_HEAD = """# The paper's figures and tables, regenerated

Output only: `scripts/reproduce.sh` writes this folder from the results that `experiments/` keeps, and nothing else.
Left the paper's published numbers, in the middle ours, right the difference. How a number was obtained is part of it:
**measured** on the machine that its row names, **emulated** (measured with a throttled resource), or **simulated** (the
real planner on a cost model of the paper's machines: no GPU was used). Nothing simulated is evidence that the hardware
does it.

*Agrees*: `yes` when every number is within 10 % of what the paper's text claims, `partly` when some are (of a typical
number: within 25 %), `no` else. A range of ratios is over all panels and points of the figure; a typical difference is
the median over its numbers, without those that are inputs.

| | the paper's claim | paper's text | paper's figure | ours | how | agrees |
|---|---|---|---|---|---|---|
"""


def overview(items: Sequence[Item], rows: Mapping[str, Sequence[Row]], images: Sequence[str]) -> str:
    """Markdown."""
    lines = [line for item in items for line in _table_lines(item, rows[item.folder])]
    sections = [_section(item, rows[item.folder], images) for item in items]
    return _HEAD + "\n".join(lines) + "\n\n" + "\n".join(sections)


def _table_lines(item: Item, ours: Sequence[Row]) -> list[str]:
    how = ", ".join(dict.fromkeys(row.how for row in ours if row.y is not None)) or "-"
    paper = paper_rows(item.key)
    difference = typical_difference(item, paper, ours)
    link = f"[{item.key}](#{item.key})"
    lines = [
        f"| {link} | {check.text} | {_range(check)} | {_span(check, paper)} | {_span(check, ours)} "
        f"| {how} | {check.verdict(ours)} |"
        for check in item.checks
    ]
    if paper and difference is not None:
        verdict = numbers_verdict(difference)
        lines.append(f"| {link} | {item.claim} | | | typically {difference:.0%} off | {how} | {verdict} |")
    elif not lines:
        state = "see the image" if how != "-" else _first_note(ours)
        lines.append(f"| {link} | {item.claim} | | | {state} | {how} | |")
    return lines


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


def _section(item: Item, ours: Sequence[Row], images: Sequence[str]) -> str:
    names = {panel.image or item.folder for panel in item.panels} or {item.folder}
    pictures = [f"![{item.title}]({name})" for name in images if name.removesuffix(".png") in names]
    machines = ", ".join(dict.fromkeys(row.machine for row in ours if row.machine))
    notes = [check.why for check in item.checks if check.why] + ([item.why] if item.why else [])
    paragraphs = [
        f'<a id="{item.key}"></a>\n## {item.title}',
        *pictures,
        f"How: {item.how}" + (f" Machines: {machines}." if machines else ""),
        *(f"- {note}" for note in notes),
        f"Run: `scripts/reproduce.sh {item.key}`; [its folder](../experiments/{item.folder}/README.md).",
    ]
    return "\n\n".join(paragraphs) + "\n"
