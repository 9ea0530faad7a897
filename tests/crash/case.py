"""One case: a store's life with one kind of trouble, made from a seed."""

from __future__ import annotations

import random
import subprocess
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.crash import mutations
from tests.crash.ledger import Broken, Ledger
from tests.crash.opened import StoreSpec, open_store
from tests.crash.verify import Findings, read_all, read_texts
from tests.crash.workload import Workload
from tests.crash.zygote import Zygote

ROOMY_BYTES = 1 << 30


class Unavailable(Exception):
    """A kind that cannot run here, or not with this backend; says why."""


def copy_files(source: Path, target: Path) -> None:
    """Copy a directory, holes and all."""
    subprocess.run(["cp", "-a", source, target], check=True)


@dataclass(kw_only=True)
class Nursery:
    """The zygotes of a campaign."""

    library: Path | None = None
    """For LD_PRELOAD; None where there is no C compiler."""
    undo: ExitStack = field(default_factory=ExitStack)

    @cached_property
    def plain(self) -> Zygote:
        """Children on the disk as it is."""
        return self._make(None)

    @cached_property
    def preloaded(self) -> Zygote:
        """Children whose system calls may be made to fail, or are recorded."""
        assert self.library is not None
        return self._make(self.library)

    def _make(self, library: Path | None) -> Zygote:
        zygote = Zygote(library)
        self.undo.callback(zygote.close)
        return zygote


@dataclass(kw_only=True)
class Case:
    """What a kind gets: a directory, a seed, and counters."""

    kind: str
    seed: str
    io: str
    num_paths: int
    root: Path
    nursery: Nursery
    mutate: str | None = None
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.rng = random.Random(f"{self.seed} {self.kind} {self.io} {self.num_paths}")
        self._num_files = 0

    def spec(self, *, is_tight: bool, scale: str, **more: Any) -> StoreSpec:
        """A store in the case's directory; a tight one is too small for all names."""
        tight_bytes = 400_000 if scale == "small" else 6 << 20
        return StoreSpec(
            paths=tuple(str(self.root / f"state{idx}") for idx in range(self.num_paths)),
            io=self.io,
            capacity_bytes=tight_bytes * self.num_paths if is_tight else ROOMY_BYTES,
            segment_bytes=self.rng.choice([100_000, 400_000]) if scale == "small" else 4 << 20,
            # a defect is looked for where most is promised
            durability="strict" if self.mutate else self.rng.choice(["strict", "relaxed"]),
            **more,
        )

    def file(self, suffix: str) -> Path:
        """A name for a new file beside the store."""
        self._num_files += 1
        return self.root / f"{self._num_files:04d}.{suffix}"

    def feed(self, ledger: Ledger, events: Path) -> None:
        """Tell the ledger all that a child said."""
        if events.exists():
            lines = events.read_text().split("\n")
            for line in lines[:-1]:
                ledger.feed(line)
            self.counts["operations"] += len(lines)

    def verify(
        self, spec: StoreSpec, ledger: Ledger, scale: str, *, is_damaged: bool = False, has_holes: bool = False
    ) -> Findings:
        """Open what a death left, read every chunk, hold it against the ledger, and use it. Raises Broken.

        `has_holes`: found spans may turn out unreadable where nothing was promised; `is_damaged`: and opening may have
        something to say.
        """
        with mutations.mutated(self.mutate):
            opened = open_store(spec)
            try:
                findings = read_all(opened.store, ledger, scale)
                texts = read_texts(opened.transcripts, ledger)
                self.counts["chunks verified"] += findings.num_chunks
                self.counts["spans found"] += sum(version > 0 for version in findings.versions.values())
                self.counts["texts found"] += len(texts)
                surprises = list(opened.notes)
                if has_holes:  # an evicted span's row may outlive its segment: such a commit is not waited for
                    surprises = [note for note in surprises if "segment files that are gone" not in note]
                else:
                    surprises += findings.refused
                if surprises and not is_damaged:
                    raise Broken(f"damage without a reason: {surprises}")
                ledger.check(findings.versions)
                ledger.check_texts(texts)
                if opened.file is not None and opened.file.disk_bytes > spec.capacity_bytes:
                    raise Broken(f"{opened.file.disk_bytes} bytes in a store for {spec.capacity_bytes}")
            finally:
                opened.close()
        self.counts["reopened"] += 1
        self.counts["promises checked"] += ledger.num_promises
        ledger.num_promises = 0
        return findings

    def copy_to(self, spec: StoreSpec, name: str) -> StoreSpec:
        """The store's files, copied."""
        target = self.root / name
        target.mkdir(exist_ok=True)
        for path in spec.paths:
            copy_files(Path(path), target / Path(path).name)
        return spec.moved_to(target)

    def workload(self, *, scale: str, num_ops: int, **more: Any) -> Workload:
        """Random work for the case's store."""
        return Workload(
            seed=self.rng.getrandbits(32), scale=scale, num_names=more.pop("num_names", 24), num_ops=num_ops, **more
        )
