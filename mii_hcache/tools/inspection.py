"""`python -m mii_hcache inspect`: what a state directory holds, and whether it is sound."""

from __future__ import annotations

import argparse
import json
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mii_hcache.core.geometry import SPAN_TOKENS
from mii_hcache.runtime.machine import filesystem_of
from mii_hcache.storage.catalog import SpanRow
from mii_hcache.tools.checkup import refuse_namespace
from mii_hcache.tools.contexts import ContextView, contexts_of
from mii_hcache.tools.directories import DEFAULT_WORDS, chosen_dirs
from mii_hcache.tools.progress import Progress
from mii_hcache.tools.state_view import StateView, look_at
from mii_hcache.tools.table import size, table
from mii_hcache.tools.verification import Verification, verify

_MOST_CONTEXTS = 20
_DESCRIPTION = """\
Shows what a state directory holds: how many conversations, in which kinds, how large, in which files. Only reads; a
server that runs on the directory is not disturbed.
"""
_EXAMPLES = """\
examples:
  python -m mii_hcache inspect
      the directory that a server takes without --state-dir
  python -m mii_hcache inspect /nvme/state --verify
      also read every chunk and compare it with its checksum; may take minutes
  python -m mii_hcache inspect /nvme/state --spans --json
      everything, for a script

exit status: 0 all that was looked at is sound, 1 something is damaged or lost, 2 it is no state directory
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 when something is damaged or lost. Raises HCacheError when there is nothing to inspect."""
    options = _parser().parse_intermixed_args(arguments)
    looked = [_look(directory, options.verify) for directory in chosen_dirs(options.state_dir)]
    if options.json:
        reports = [_to_dict(view, found, options.spans) for view, found in looked]
        print(json.dumps(reports if len(reports) > 1 else reports[0], indent=2))
    else:
        print("\n\n".join("\n".join(_lines(view, found, options.spans)) for view, found in looked))
    return int(any(view.problems or (found is not None and found.damages) for view, found in looked))


def _look(directory: Path, with_chunks: bool) -> tuple[StateView, Verification | None]:
    if with_chunks:
        refuse_namespace(directory)
    view, found = look_at(directory), None
    if with_chunks:
        progress = Progress()
        found = verify(view, lambda done, all_: progress.count("chunks", done, all_))
        progress.clear()
    return view, found


def _store_name(view: StateView) -> str | None:
    return str(uuid.UUID(bytes=view.store_uuid)) if view.store_uuid else None


def _by_kind(rows: Sequence[SpanRow]) -> dict[str, dict[str, int]]:
    kinds: dict[str, dict[str, int]] = {}
    for row in rows:
        kind = kinds.setdefault("+".join(row.record.layout.kind_names), {"num_spans": 0, "num_bytes": 0})
        kind["num_spans"] += 1
        kind["num_bytes"] += row.record.num_bytes
    return kinds


def _to_dict(view: StateView, found: Verification | None, with_spans: bool) -> dict[str, Any]:
    report: dict[str, Any] = {
        "state_dir": str(view.path),
        "filesystem": filesystem_of(view.path),
        "owner": view.owner,
        "store_uuid": _store_name(view),
        "format_version": view.format_version,
        "num_spans": len(view.rows),
        "num_bytes": sum(row.record.num_bytes for row in view.rows),
        "kinds": _by_kind(view.rows),
        "contexts": [_context_dict(context) for context in contexts_of(view.rows)],
        "segments": [asdict(segment) for segment in view.segments],
        "num_transcripts": view.num_transcripts,
        "database_bytes": view.database_bytes,
        "notes": view.notes,
        "problems": view.problems,
    }
    if with_spans:
        report["spans"] = [_span_dict(row) for row in _in_order(view.rows)]
    if found is not None:
        report["verified"] = {
            "num_chunks": found.num_chunks,
            "num_bytes": found.num_bytes,
            "damaged": [
                {**asdict(damage), "span_id": damage.span_id.hex(), "place": damage.place._asdict()}
                for damage in found.damages
            ],
        }
    return report


def _context_dict(context: ContextView) -> dict[str, Any]:
    return {**asdict(context), "last_span": context.last_span.hex()}


def _span_dict(row: SpanRow) -> dict[str, Any]:
    record = row.record
    return {
        "span_id": record.span_id.hex(),
        "parent_id": None if record.parent_id is None else record.parent_id.hex(),
        "first_token": SPAN_TOKENS * record.span_idx,
        "kinds": [None if kind is None else kind.value for kind in record.layout.kinds],
        "num_chunks": record.layout.num_chunks,
        "kv_shards": record.layout.kv_shards,
        "chunk_bytes": {kind.value: record.layout.bytes_of(kind) for kind in record.layout.kind_counts},
        "num_bytes": record.num_bytes,
        "generation": row.generation,
        "segments": sorted({place.segment for place in row.places}),
    }


def _in_order(rows: Sequence[SpanRow]) -> list[SpanRow]:
    """By position on the chain; the ids make the order a stable one."""
    return sorted(rows, key=lambda row: (row.record.span_idx, row.record.span_id))


def _lines(view: StateView, found: Verification | None, with_spans: bool) -> list[str]:
    owner = "no server uses it" if view.owner is None else f"in use by the server with process id {view.owner}"
    lines = [f"{view.path} ({filesystem_of(view.path)}), {owner}"]
    if not view.rows and not view.segments and not view.problems:
        lines.append("nothing is saved here")
    else:
        lines.append(
            f"store {uuid.UUID(bytes=view.store_uuid) if view.store_uuid else '?'}, format {view.format_version}"
        )
        num_bytes = sum(row.record.num_bytes for row in view.rows)
        kinds = ", ".join(
            f"{kind['num_spans']} {name} ({size(kind['num_bytes'])})" for name, kind in _by_kind(view.rows).items()
        )
        lines.append(f"{len(view.rows)} spans of {SPAN_TOKENS} tokens, {size(num_bytes)}{': ' if kinds else ''}{kinds}")
    lines.append(f"{view.num_transcripts} transcripts (answers whose token ids are known)")
    if view.database_bytes:
        lines.append(f"{size(view.database_bytes)} of databases, which a server's capacity does not count")
    contexts = contexts_of(view.rows)
    if contexts:
        lines += ["", f"{len(contexts)} contexts, the one used last first", _context_table(contexts[:_MOST_CONTEXTS])]
        if len(contexts) > _MOST_CONTEXTS:
            lines.append(f"... and {len(contexts) - _MOST_CONTEXTS} more; --json lists them all")
    if view.segments:
        lines += ["", _segment_table(view)]
    if with_spans and view.rows:
        lines += ["", _span_table(view.rows)]
    if found is not None:
        lines += ["", f"verified {found.num_chunks:,} chunks, {size(found.num_bytes)}: {len(found.damages)} damaged"]
        lines += [
            f"DAMAGED  span {damage.span_id.hex()[:16]} layer {damage.layer_idx} "
            f"(segment {damage.place.segment}, slot {damage.place.slot}): {damage.reason}"
            for damage in found.damages
        ]
    extra = [*(f"note     {note}" for note in view.notes), *(f"PROBLEM  {problem}" for problem in view.problems)]
    return [*lines, *(["", *extra] if extra else [])]


def _context_table(contexts: Sequence[ContextView]) -> str:
    rows = [
        [
            context.last_span.hex()[:16],
            "+".join(context.kinds),
            f"{context.num_tokens:,}",
            size(context.num_bytes),
            size(context.own_bytes),
            "" if context.first_token == 0 else f"cut off: spans before token {context.first_token} are missing",
        ]
        for context in contexts
    ]
    return table(["last span", "kind", "tokens", "size", "of its own", "note"], rows, left=2)


def _segment_table(view: StateView) -> str:
    rows = [
        [
            segment.name,
            size(segment.slot_bytes),
            f"{segment.num_slots:,}",
            f"{segment.num_used:,}",
            f"{segment.num_free:,}",
            size(segment.disk_bytes),
        ]
        for segment in view.segments
    ]
    return table(["segment", "slot", "slots", "used", "free", "on disk"], rows)


def _span_table(rows: Sequence[SpanRow]) -> str:
    cells = [
        [
            row.record.span_id.hex()[:16],
            " + ".join(f"{kind.value} {num}" for kind, num in row.record.layout.kind_counts.items()),
            f"{SPAN_TOKENS * row.record.span_idx:,}",
            size(row.record.num_bytes),
            ",".join(str(number) for number in sorted({place.segment for place in row.places})),
        ]
        for row in _in_order(rows)
    ]
    return table(["span", "layers", "first token", "size", "segments"], cells, left=2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mii_hcache inspect",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "state_dir", nargs="*", metavar="STATE_DIR", help=f"one after another; default: {DEFAULT_WORDS}"
    )
    parser.add_argument("--spans", action="store_true", help="list every span as well")
    parser.add_argument("--verify", action="store_true", help="read every chunk and check its header and its CRC32C")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser
