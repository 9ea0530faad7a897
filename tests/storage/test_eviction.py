"""Which spans go first: by use alone, and by what they are worth."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mii_hcache.storage.eviction import CostAware, Lru, order_named
from tests.storage.storage_kit import StoreKit, make_record, put

START_S = 1.7e9


class Clock:
    def __init__(self):
        self.now_s = START_S

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


def chain_in(order, name, num, sizes=None):
    keys = [f"{name}{idx}".encode() for idx in range(num)]
    for idx, key in enumerate(keys):
        if sizes is not None:
            sizes[key] = 1000
        order.add(key, keys[idx - 1] if idx else None, idx)
    return keys


def test_names_lead_to_orders():
    assert type(order_named("lru", len)) is Lru
    assert type(order_named("cost", len)) is CostAware


def test_unweighed_a_chain_goes_from_its_end_and_the_oldest_first(clock):
    order = CostAware(lambda key: 1000, clock)
    chains = []
    for name in "abc":
        chains.append(chain_in(order, name, 3))
        clock.now_s += 60
    a, b, c = chains
    order.use([a[2]])
    assert list(order.victims()) == [*reversed(b), *reversed(c), *reversed(a)]
    order.pin([b[2], a[0]])
    assert list(order.victims()) == [b[1], b[0], *reversed(c), a[2], a[1]]


def test_weighed_what_saves_less_goes_first_within_one_history_and_the_tail_last(clock):
    order = CostAware(lambda key: 1000, clock)
    keys = chain_in(order, "a", 40)
    order.weigh(lambda depth: 1.0 + depth / 10)
    assert list(order.victims()) == keys
    assert list(order.victims()) == keys, "asking changes nothing"


def test_worth_outweighs_age_and_age_outweighs_worth(clock):
    """Twice as much is lost with the deeper span: the shallower goes first until the other is sqrt(2) times as old."""
    order = CostAware(lambda key: 1000, clock)
    order.weigh(lambda depth: 2.0**depth)
    order.add(b"deep", None, 1)
    clock.now_s += 100
    order.add(b"shallow", None, 0)
    clock.now_s += 1000
    assert list(order.victims()) == [b"shallow", b"deep"]
    clock.now_s += -1000 + 100
    assert list(order.victims()) == [b"deep", b"shallow"]


def test_large_spans_are_worth_less(clock):
    sizes = {b"large": 4000, b"small": 1000}
    order = CostAware(sizes.__getitem__, clock)
    order.add(b"small", None, 0)
    clock.now_s += 10
    order.add(b"large", None, 0)
    clock.now_s += 100
    assert list(order.victims()) == [b"large", b"small"]


def test_what_several_histories_go_on_from_is_kept(clock):
    order = CostAware(lambda key: 1000, clock)
    shared = chain_in(order, "s", 2)
    for branch in range(8):
        order.add(b"branch%d" % branch, shared[-1], 2)
    order.use(shared)
    clock.now_s += 10
    alone = chain_in(order, "alone", 2)
    clock.now_s += 100
    went = list(order.victims())
    assert went[-2:] == [shared[1], shared[0]] and went.index(alone[0]) < went.index(shared[1])
    for branch in range(8):
        order.remove(b"branch%d" % branch)
    order.use([shared[1]])
    clock.now_s += 10
    order.use([alone[1]])
    assert next(order.victims()) == shared[1], "no history goes through it any more"


def test_a_span_saved_anew_again_and_again_is_no_second_branch(clock):
    order = CostAware(lambda key: 1000, clock)
    keys = chain_in(order, "a", 3)
    for _ in range(10):
        order.remove(keys[2])
        order.add(keys[2], keys[1], 2)
    assert order._branches == {}


def test_branches_are_known_again_after_a_restart(clock):
    order = CostAware(lambda key: 1000, clock)
    root = chain_in(order, "r", 1)[0]
    for branch in range(5):
        order.add(b"branch%d" % branch, root, 1)
    loaded = CostAware(lambda key: 1000, clock)
    loaded.load(
        (key, None if key == root else root, int(key != root), order.tick_of(key)) for key in list(order.victims())
    )
    assert loaded._branches == order._branches == {root: 5}
    clock.now_s += 100
    assert list(loaded.victims())[-1] == root


KEYS = st.integers(0, 7)
STEPS = st.one_of(
    st.tuples(st.just("add"), KEYS, KEYS),
    st.tuples(st.just("use"), KEYS, KEYS),
    st.tuples(st.just("remove"), KEYS, KEYS),
    st.tuples(st.just("pin"), KEYS, KEYS),
    st.tuples(st.just("unpin"), KEYS, KEYS),
    st.tuples(st.just("wait"), st.integers(0, 500), KEYS),
    st.tuples(st.just("weigh"), st.integers(1, 4), KEYS),
)


@given(steps=st.lists(STEPS, max_size=60))
def test_victims_come_in_the_order_of_their_value(steps):
    """Whatever happens: every key that may go is named once, and values never fall."""
    clock = Clock()
    order = CostAware(lambda key: 500 * (1 + key[0]), clock)
    pins: dict[bytes, int] = {}
    there: dict[bytes, int] = {}
    for verb, left, right in steps:
        key = bytes([left % 8])
        if verb == "add" and key not in order:
            parent = bytes([right]) if bytes([right]) in there and left != right else None
            there[key] = there[parent] + 1 if parent else 0
            order.add(key, parent, there[key])
        elif verb == "use":
            order.use([key, bytes([right])])
        elif verb == "remove" and key in order:
            order.remove(key)
            del there[key]
        elif verb == "pin":
            order.pin([key])
            pins[key] = pins.get(key, 0) + 1
        elif verb == "unpin":
            order.unpin([key])
            pins[key] = max(0, pins.get(key, 0) - 1)
        elif verb == "wait":
            clock.now_s += left
        elif verb == "weigh":
            order.weigh(lambda depth, slope=left: 1.0 + slope * depth)
    went = list(order.victims())
    assert sorted(went) == sorted(key for key in there if not pins.get(key))
    assert set(order._class_of) == set(there) == {key for keys in order._classes.values() for key in keys}

    def value(key):
        age_s = max(1.0, clock.now_s - order.tick_of(key) / 1e6)
        return order._class_of[key] / 2 - 2 * math.log2(age_s)

    values = [value(key) for key in went]
    assert all(left <= right + 1e-9 for left, right in pairwise(values))


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_a_weighed_store_gives_up_heads_before_tails(kind, tmp_path, monkeypatch):
    kit = StoreKit(kind, tmp_path / "state")
    store = kit.open(kit.capacity_for(10), evict="cost")
    store.weigh(lambda depth: 1.0 + depth)
    records = [make_record(idx, parent=idx - 1 if idx else None, span_idx=idx) for idx in range(10)]
    assert all(put(store, record) for record in records)
    assert all(put(store, make_record(f"other{idx}", span_idx=9)) for idx in range(4))
    assert [idx for idx, record in enumerate(records) if store.find(record.span_id)] == [4, 5, 6, 7, 8, 9]
    assert store.stats().evicted_spans == 4
    kit.close()


def test_use_of_what_was_just_used_is_the_same_use_and_later_is_not(clock):
    order = Lru(clock)
    keys = chain_in(order, "a", 3)
    order.use([keys[2]])
    tick = order.tick_of(keys[0])
    order.use([keys[1]])
    assert order.tick_of(keys[1]) == tick
    clock.now_s += 2
    order.use([keys[2]])
    assert order.tick_of(keys[0]) == order.tick_of(keys[2]) == int(clock.now_s * 1e6)


def test_ticks_of_older_stores_are_uses_just_before_now(clock):
    order = Lru(clock)
    order.load([(b"a", None, 0, 7), (b"b", None, 0, 5), (b"c", b"a", 1, 7)])
    assert list(order.victims()) == [b"b", b"c", b"a"]
    assert order.unused_since(START_S - 1) == []
    assert len(order.unused_since(START_S + 1)) == 3
    assert sorted(key for key, _ in order.take_moved()) == [b"a", b"b", b"c"]


def test_a_clock_that_is_set_back_does_not_turn_the_order_around(clock):
    order = Lru(clock)
    order.add(b"a", None, 0)
    clock.now_s -= 3600
    order.add(b"b", None, 0)
    assert list(order.victims()) == [b"a", b"b"]
