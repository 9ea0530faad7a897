"""Is all of a state directory as it was written? And if not: forgetting what is not, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mii_hcache.errors import ConfigError, StateDirBusyError
from mii_hcache.storage.catalog import Catalog, salvage
from mii_hcache.storage.state_dir import NAMESPACE_FILE, StateDir, owner_of, store_uuid_in
from mii_hcache.storage.survey import OURS
from mii_hcache.storage.transcripts import Transcripts
from mii_hcache.tools.state_view import StateView, look_at
from mii_hcache.tools.table import size
from mii_hcache.tools.verification import Verification, compare, verify


@dataclass(kw_only=True)
class Checkup:
    """What was found in one state directory, and what was done about it."""

    view: StateView
    found: Verification
    repairs: list[str] = field(default_factory=list)
    """What `repair` did, one sentence each."""

    @property
    def is_clean(self) -> bool:
        """Whether nothing was damaged or lost when it was looked at."""
        return not self.view.problems and not self.found.damages

    @property
    def unreferenced_bytes(self) -> int:
        """What segment files hold that no row of the catalog names: free slots, and what a crash left."""
        return sum(segment.unused_bytes for segment in self.view.segments)

    @property
    def segment_bytes(self) -> int:
        """What segment files of this store take on disk."""
        return sum(segment.disk_bytes for segment in self.view.segments)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "state_dir": str(self.view.path),
            "ok": self.is_clean,
            "num_spans": len(self.view.rows),
            "num_chunks": self.found.num_chunks,
            "num_bytes": self.found.num_bytes,
            "num_transcripts": self.view.num_transcripts,
            "segment_bytes": self.segment_bytes,
            "unreferenced_bytes": self.unreferenced_bytes,
            "database_bytes": self.view.database_bytes,
            "other_files": [
                {"name": file.path.name, "state": file.state, "why": file.why, "disk_bytes": file.disk_bytes}
                for file in self.view.files
                if file.state != OURS
            ],
            "notes": self.view.notes,
            "problems": self.view.problems,
            "damaged": [
                {**asdict(damage), "span_id": damage.span_id.hex(), "place": damage.place._asdict()}
                for damage in self.found.damages
            ],
            "repairs": self.repairs,
        }

    def to_lines(self) -> list[str]:
        """For people."""
        return [
            f"{self.view.path}: {len(self.view.rows):,} spans, {self.found.num_chunks:,} chunks, "
            f"{size(self.found.num_bytes)} read; {self.view.num_transcripts:,} transcripts",
            f"on disk: {size(self.segment_bytes)} of segments, of which {size(self.unreferenced_bytes)} hold nothing "
            f"that the catalog names; {size(self.view.database_bytes)} of databases",
            *(f"note      {note}" for note in self.view.notes),
            *(f"PROBLEM   {problem}" for problem in self.view.problems),
            *(
                f"{'UNREAD ' if damage.is_unread else 'DAMAGED'}   span {damage.span_id.hex()[:16]} layer "
                f"{damage.layer_idx} (segment {damage.place.segment}, slot {damage.place.slot}): {damage.reason}"
                for damage in self.found.damages
            ),
            *(f"repaired  {repair}" for repair in self.repairs),
            "clean" if self.is_clean else "damaged, and repaired" if self.repairs else "damaged",
        ]


def check(directory: Path, count: Callable[[int, int], None]) -> Checkup:
    """Read everything; change nothing. `count(done, all)` of chunks is called often. Raises StateDirBusyError when a
    server has the directory, before or meanwhile, ConfigError when it is no state directory, cannot be read, or keeps
    its segments on a namespace."""
    refuse_if_owned(directory)
    refuse_namespace(directory)
    view = look_at(directory)
    view.notes += [
        f"{segment.name} holds nothing that the catalog names; a server, or `gc`, gives its {size(segment.disk_bytes)} "
        "back"
        for segment in view.segments
        if not segment.num_used
    ]
    if store_uuid_in(directory) is None and view.segments:
        view.notes.append("store.id is missing or unreadable; the catalog knows the store's identity, too")
    checkup = Checkup(view=view, found=verify(view, count))
    refuse_if_owned(directory)
    return checkup


def repair(checkup: Checkup) -> None:
    """Forget what is damaged, and never more: spans with a chunk that is not what was written. A database that cannot
    be believed is set aside, as a server would do, but what is provably right in a catalog is taken over. What the disk
    did not give is left alone, for it may yet.

    Raises StateDirBusyError, ConfigError.
    """
    doomed = {(damage.span_id, damage.generation) for damage in checkup.found.damages if not damage.is_unread}
    if checkup.is_clean:
        return
    with closing(StateDir(checkup.view.path)) as state_dir:
        store_uuid = state_dir.read_store_uuid()
        if state_dir.catalog.exists() or store_uuid is not None:  # else segments would belong to nobody for ever
            with closing(Catalog(state_dir.catalog, store_uuid)) as catalog:
                known = {(row.record.span_id, row.generation) for row in catalog.rows}
                doomed &= known
                if doomed:
                    catalog.commit(drop=doomed)
                    checkup.repairs.append(f"{len(doomed)} spans with damaged or lost chunks were forgotten")
                if catalog.note is not None:
                    checkup.repairs.append(catalog.note)
                    _bring_back(checkup, catalog)
                if catalog.is_new:
                    checkup.repairs.append("a new catalog was made; what was saved is forgotten")
                if store_uuid is None:
                    state_dir.write_store_uuid(catalog.store_uuid)
        if state_dir.transcripts.exists():
            with closing(Transcripts(state_dir.transcripts, flush_interval_s=None)) as transcripts:
                if transcripts.note is not None:
                    checkup.repairs.append(transcripts.note)


def _bring_back(checkup: Checkup, catalog: Catalog) -> None:
    """Of a catalog that was set aside, take over the rows that are sound and whose every chunk is what they say: the
    header of each slot carries store, span and generation, so that no row can claim what was deleted or written over
    since."""
    rows = [] if catalog.aside is None else salvage(catalog.aside)
    view = replace(checkup.view, store_uuid=catalog.store_uuid)
    doubtful = {damage.span_id for damage in compare(view, rows, lambda done, all_: None).damages}
    sound = [row for row in rows if row.record.span_id not in doubtful]
    if sound:
        catalog.commit(add=sound)
        checkup.repairs.append(f"{len(sound)} spans of the old catalog are sound and were taken over")


def refuse_if_owned(directory: Path) -> None:
    """Raise StateDirBusyError when a server has the directory."""
    owner = owner_of(directory) if directory.is_dir() else None
    if owner is not None:
        raise StateDirBusyError(
            f"{directory} is in use by the server with process id {owner}; stop it first, or look with "
            "`python -m mii_hcache inspect --verify`, which disturbs nobody"
        )


def refuse_namespace(directory: Path) -> None:
    """Raise ConfigError when the segments are not here: what is not seen must not be called lost."""
    if (directory / NAMESPACE_FILE).exists():
        raise ConfigError(
            f"{directory} keeps its segments on an NVMe namespace, and only files can be looked at; a server checks "
            "what it reads"
        )
