"""Slots are never taken twice, and files never occupy more than the capacity."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mii_hcache.storage.slots import Place, Places, SlotPool, SlotSet

SIZES = (8192, 12_288, 40_960)
CAPACITY_BYTES = 200_000
BLOCK = 4096
slots_wanted = st.dictionaries(st.sampled_from(SIZES), st.integers(1, 8), min_size=1, max_size=2)


class PoolMachine(RuleBasedStateMachine):
    """The pool against a model of the disk: which slots were written and not given up, in which files."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = SlotPool(CAPACITY_BYTES, segment_bytes=60_000)
        self.taken: dict[Place, int] = {}
        self.on_disk: dict[int, tuple[int, set[int]]] = {}

    def write(self, places: list[Place]) -> None:
        for place in places:
            size, num_slots = self.pool.shape(place.segment)
            assert place not in self.taken
            assert 0 <= place.slot < num_slots
            self.taken[place] = size
            self.on_disk.setdefault(place.segment, (size, set()))[1].add(place.slot)

    @rule(wanted=slots_wanted, may_grow=st.booleans())
    def take(self, wanted, may_grow):
        missing_bytes = self.pool.missing_bytes(wanted)
        missing_slots = self.pool.missing_slots(wanted)
        before = self.pool.disk_bytes
        assert missing_slots == {n: k - self.pool.num_free(n) for n, k in wanted.items() if k > self.pool.num_free(n)}
        taken = self.pool.take(wanted, may_grow=may_grow)
        assert (taken is not None) == (missing_bytes <= 0 and (may_grow or not missing_slots))
        if taken is None:
            assert self.pool.disk_bytes == before, "all or nothing"
            return
        assert {size: len(set(places)) for size, places in taken.items()} == wanted
        for size, places in taken.items():
            assert all(self.pool.shape(place.segment)[0] == size for place in places)
            self.write(places)
        grown_bytes = self.pool.disk_bytes - before
        assert missing_bytes == (grown_bytes - (CAPACITY_BYTES - before) if grown_bytes else 0), "it was exact"

    @precondition(lambda self: self.taken)
    @rule(data=st.data(), blank=st.booleans())
    def give(self, data, blank):
        places = data.draw(st.lists(st.sampled_from(sorted(self.taken)), unique=True, min_size=1))
        for place in places:
            del self.taken[place]
            if blank:
                self.on_disk[place.segment][1].discard(place.slot)
        self.pool.give(places, blank=blank)

    @rule(wanted=slots_wanted, num_bytes=st.integers(1, 200_000))
    def punch_spare(self, wanted, num_bytes):
        num_free = {size: self.pool.num_free(size) for size in SIZES}
        spare_bytes = sum(size * max(0, num - wanted.get(size, 0)) for size, num in num_free.items())
        places = self.pool.take_spare(wanted, num_bytes)
        for size in wanted:
            assert self.pool.num_free(size) >= min(num_free[size], wanted[size]), "what is useful stays"
        assert sum(self.pool.shape(place.segment)[0] for place in places) >= min(num_bytes, spare_bytes)
        self.write(places)
        for place in places:
            del self.taken[place]
            self.on_disk[place.segment][1].discard(place.slot)
        self.pool.give(places, blank=True)

    @rule()
    def remove_empty(self):
        before = self.pool.disk_bytes
        empty = self.pool.take_empty()
        assert self.pool.disk_bytes == before, "counted until the files are gone"
        assert {place.segment for place in self.taken}.isdisjoint(empty)
        for number in empty:
            self.on_disk.pop(number, None)
        self.pool.forget_bytes()

    @rule()
    def reopen(self):
        pool = SlotPool(CAPACITY_BYTES, segment_bytes=60_000)
        for number, (size, slots) in self.on_disk.items():
            taken = SlotSet()
            for place in self.taken:
                assert place.segment != number or taken.add(place.slot, place.slot + 1)
            pool.add_segment(number, size, self.pool.shape(number)[1], taken, max(slots, default=-1) + 1)
        free = pool.take_all_free()
        assert set(free).isdisjoint(self.taken)
        for place in free:
            self.on_disk[place.segment][1].discard(place.slot)
        pool.give(free, blank=True)
        self.pool = pool

    @invariant()
    def bound_holds(self):
        really = sum(BLOCK + size * len(slots) for size, slots in self.on_disk.values())
        assert really <= self.pool.disk_bytes <= CAPACITY_BYTES

    @invariant()
    def what_is_free_can_be_taken(self):
        for size in SIZES:
            assert self.pool.missing_bytes({size: self.pool.num_free(size)}) <= 0


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_fits_is_exact():
    for size, other in itertools.product(SIZES, SIZES):
        for num, num_other in itertools.product(range(1, 40), range(0, 20, 3)):
            pool = SlotPool(CAPACITY_BYTES, segment_bytes=60_000)
            wanted = {other: num_other, size: num}
            assert pool.fits(wanted) == (pool.take(wanted) is not None)


def test_numbers_of_files_that_are_there_are_not_used_again():
    pool = SlotPool(CAPACITY_BYTES, segment_bytes=60_000)
    pool.reserve_number(41)
    assert pool.take({8192: 1}) == {8192: [Place(42, 0)]}
    pool.give([Place(42, 0)])
    assert pool.take_empty() == [42]
    pool.forget_bytes()
    assert pool.take({8192: 1}) == {8192: [Place(43, 0)]}


words = st.integers(0, 2**32 - 2)


@given(
    pairs=st.one_of(
        st.lists(st.tuples(words, words)),
        st.tuples(words, st.integers(0, 99), st.integers(0, 20)).map(lambda t: [(t[0], t[1] + i) for i in range(t[2])]),
    )
)
def test_packed_places_are_a_sequence(pairs):
    places = Places(pairs)
    assert list(places) == [places[idx] for idx in range(len(places))] == pairs
    assert places[1:3] == pairs[1:3]
    assert all(isinstance(place, Place) for place in places)
    assert [(segment, slot) for segment, start, stop in places.runs() for slot in range(start, stop)] == pairs


def test_neighbours_are_one_run():
    assert Places([(7, 3), (7, 4), (7, 5)]).runs() == [(7, 3, 6)]
    assert len(Places([(7, 3), (7, 5), (7, 4)]).runs()) == 3
    assert len(Places([(7, 3), (8, 4)]).runs()) == 2
    assert Places([(7, 3), (7, 4), (8, 0), (8, 1), (7, 5)]).runs() == [(7, 3, 5), (8, 0, 2), (7, 5, 6)]
    assert len(Places([(7, 0), (7, 2**32 - 2)]).runs()) == 2  # in no time


@given(runs=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 9))))
def test_slot_sets_are_sets(runs):
    found = SlotSet()
    seen: set[int] = set()
    for start, num in runs:
        slots = set(range(start, start + num))
        assert found.add(start, start + num) == seen.isdisjoint(slots)
        seen |= slots if seen.isdisjoint(slots) else set()
    assert {slot for slot in range(400) if slot in found} == seen
    assert (found.num, found.stop) == (len(seen), max(seen, default=-1) + 1)
