"""What a store has promised, by what its writer said."""

from __future__ import annotations

import copy
from collections.abc import Iterable

ABSENT = 0
"""In place of a version: the span is not there."""


class Broken(AssertionError):
    """A promise was not kept: a wrong byte, a lost span that was durable, a deleted one that came back."""


class Ledger:
    """For each name, which versions a read may find now (`now`), and which after a death at this moment (`crash`).

    Fed with the words of a `Workload`, in order. Names belong to threads (`name % num_threads`), which use only their
    own, so that every name has one history. In a store that `may_vanish` (too small for all, or on a failing disk) a
    span may be gone at any time, unless it was pinned and seen after that (`held`). While `is_faulty`, a flush
    promises nothing: the disk may have refused it, which is logged and not raised.
    """

    def __init__(
        self, num_names: int, num_threads: int, *, may_vanish: bool, is_faulty: bool = False, is_tiered: bool = False
    ) -> None:
        """`is_tiered`: what files refused lives on in DRAM until the end, and is not tried again."""
        self.names = range(1, num_names + 1)
        self._unsure: set[int] = set()
        """May be found, and even be put anew in vain, and turn out damaged when read: since a power cut that cost what
        was flushed."""
        self.may_vanish, self.is_faulty, self.is_tiered = may_vanish, is_faulty, is_tiered
        self.has_holes = False
        """Whether spans that are found may turn out damaged, as after a power cut."""
        self.outlives_power = True
        """Whether what was flushed outlives the next death: not a power cut when durability is `relaxed`. Deletions
        do always."""
        self.num_threads = num_threads
        self.now: dict[int, set[int]] = {name: {ABSENT} for name in self.names}
        self.crash: dict[int, set[int]] = {name: {ABSENT} for name in self.names}
        self.ever: dict[int, set[int]] = {name: {ABSENT} for name in self.names}
        """All versions that anybody ever began to put."""
        self.tried: dict[int, set[int]] = {name: set() for name in self.names}
        """Versions of which any may have stayed: a name stands for its contents, which differ here to be told apart."""
        self.held: set[int] = set()
        self.texts: set[int] = set()
        self._remembered: set[int] = set()
        self.promised_texts: set[int] = set()
        self._removed: set[int] = set()
        """Deleted by somebody, and not put since."""
        self._at_flush: dict[int, dict[int, set[int]]] = {}
        self._removed_at_flush: dict[int, set[int]] = {}
        self._texts_at_flush: dict[int, set[int]] = {}
        self.num_promises = 0
        """How often something had to be there, or had to be gone, and was looked for."""

    def copy(self) -> Ledger:
        """A ledger that goes its own way."""
        return copy.deepcopy(self)

    def feed(self, line: str) -> None:
        """Take note of a line. Raises Broken for what may not be."""
        word, *rest = line.split(" ", 2)
        numbers = [int(number) for number in rest if number.lstrip("-").isdecimal()]
        method = getattr(self, f"_{word}", None)
        if method is None:
            raise Broken(f"the writer says: {line}")
        method(*numbers)

    def after_crash(self, name: int) -> set[int]:
        """What may be found of a name after a death now."""
        may_be_absent = not self.outlives_power or (self.may_vanish and name not in self.held)
        return self.crash[name] | self.tried[name] | ({ABSENT} if may_be_absent else set())

    def restart(self, found: dict[int, int] | None) -> None:
        """The process died; `found` is what was there afterwards, None when nobody looked."""
        for name in self.names:
            left = self.after_crash(name) if found is None else {found[name]}
            self.now[name], self.crash[name] = set(left), set(left)
        self.held.clear()
        self._unsure = set() if self.outlives_power else set(self.names)
        self._remembered = set(self.promised_texts)
        self._at_flush.clear()
        self._texts_at_flush.clear()

    def check(self, found: dict[int, int]) -> None:
        """Raise Broken unless `found` may be there after a death now."""
        for name, version in found.items():
            allowed = self.after_crash(name)
            self.num_promises += len(allowed) == 1
            if version not in allowed:
                what = "is gone" if version == ABSENT else f"is there as version {version}"
                raise Broken(f"span {name} {what}; promised was one of {sorted(allowed)} (0: gone)")

    def check_texts(self, found: Iterable[int]) -> None:
        """The same for remembered texts."""
        lost = self.promised_texts - set(found)
        if lost:
            raise Broken(f"texts {sorted(lost)} were flushed and are gone")

    def _own(self, thread: int) -> list[int]:
        return [name for name in self.names if name % self.num_threads == thread]

    def _may_be_absent(self, name: int) -> bool:
        return ABSENT in self.now[name] or name in self._unsure or (self.may_vanish and name not in self.held)

    def _opened(self) -> None:
        pass

    def _put(self, name: int, version: int) -> None:
        self.crash[name].add(version)
        self.ever[name].add(version)
        self._removed.discard(name)

    def _tried(self, name: int, version: int) -> None:
        self.tried[name].add(version)
        self.ever[name].add(version)

    def _accepted(self, name: int, version: int) -> None:
        there = self.now[name] - {ABSENT}
        if self._may_be_absent(name):
            self.now[name] = there | {version}
        else:
            self.now[name] = there  # the first writer stays
            self.crash[name].discard(version)

    def _refused(self, name: int, version: int) -> None:
        if not self.may_vanish:
            raise Broken(f"a put of span {name} was refused, with room for it")
        self.crash[name].discard(version)

    def _delete(self, name: int) -> None:
        self.crash[name].add(ABSENT)

    def _deleted(self, name: int) -> None:
        self.now[name] = {ABSENT}
        self.held.discard(name)
        self._unsure.discard(name)
        self._removed.add(name)

    def _found(self, name: int, version: int) -> None:
        if version not in self.now[name]:
            raise Broken(f"span {name} reads as version {version}, not as one of {sorted(self.now[name])}")
        self.now[name] = {version}
        self._unsure.discard(name)

    def _gone(self, name: int) -> None:
        if not self._may_be_absent(name):
            raise Broken(f"span {name} is gone, though nothing took it")
        # On a failing disk it may only be out of reach, and come back.
        self.now[name] = self.now[name] | {ABSENT} if self.is_faulty else {ABSENT}

    def _damaged(self, name: int) -> None:
        if not self.has_holes:
            raise Broken(f"span {name} was found and could not be read")
        self._gone(name)

    def _held(self, name: int) -> None:
        """Pinned, and found after that."""
        if not self.is_faulty and name not in self.held:
            self.now[name].discard(ABSENT)
            self.crash[name].add(ABSENT)  # of what was there before, all may have been evicted until now
            self.held.add(name)

    def _flush(self, thread: int) -> None:
        self._at_flush[thread] = {name: set(self.now[name]) for name in self._own(thread)}
        self._removed_at_flush[thread] = set(self._removed)
        self._texts_at_flush[thread] = set(self._remembered)

    def _flushed(self, thread: int) -> None:
        if not self.is_faulty:
            for name, versions in self._at_flush[thread].items():
                # Held since a moment ago, or evicted since: what was seen last is what the flush had.
                if self.outlives_power or name in self._removed_at_flush[thread]:
                    self.crash[name] = set(versions)
                else:  # evicted, it may come back; put, it may be lost
                    self.crash[name] |= versions
                if self.may_vanish and name not in self.held:
                    self.crash[name].add(ABSENT)
            self.promised_texts |= self._texts_at_flush[thread]

    def _text(self, number: int) -> None:
        self.texts.add(number)

    def _remembers(self, number: int) -> None:
        self._remembered.add(number)

    def _struck(self, num_faults: int) -> None:
        pass

    def _is(self, name: int, version: int) -> None:
        """Found when all was quiet; nobody kept count before."""
        self.ever[name].add(version)
        self.now[name] = {version}
        self.crash[name].add(version)

    def _healthy(self) -> None:
        """Trouble is over. What it cost is gone for good, and nothing else will be lost."""
        if self.is_faulty:
            for name in self.names:
                self.now[name].add(ABSENT)
                self.crash[name].add(ABSENT)
            self.is_faulty = False
            self.may_vanish = self.is_tiered

    def _closed(self) -> None:
        for thread in range(self.num_threads):
            self._flush(thread)
            self._flushed(thread)
