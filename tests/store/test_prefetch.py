"""Experts that the store is told to expect: what they displace, who waits, what a wrong guess
costs."""

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_tool.artifacts.run_stats import PhaseCounters
from moe_tool.errors import CorruptArtifactError
from moe_tool.policies.eviction import Lru
from moe_tool.store.record_store import RecordStore
from tests.store.fake_bundle import RECORD_BYTES, FakeBundle, tag

KEYS = [(layer, expert) for layer in (0, 1) for expert in range(4)]


@pytest.fixture
def bundle():
    return FakeBundle()


@pytest.fixture
def open_store(bundle):
    stores = []

    def build(**options):
        stores.append(RecordStore(bundle, form=0, eviction=Lru, **options))
        return stores[-1]

    yield build
    for waiting in bundle.held_back.values():
        waiting.set()
    for store in stores:
        store.close()


def _use(store, layer, experts, *, expected=None, counters=None):
    """Run a layer call, telling the store (layer, ranked experts) when its reads have begun."""
    counters = counters or PhaseCounters()
    supply = store.acquire(layer, experts, counters)
    if expected is not None:
        _expect(store, *expected, counters)
    came = []
    for expert, weights in supply:
        values = weights["up_proj"].values
        assert (values == tag(layer, expert)).all()
        time.sleep(0.0003)  # computing; a read into this slot would show
        assert (values == tag(layer, expert)).all()
        came.append(expert)
    return came


def _expect(store, layer, experts, counters):
    absent = [expert for expert in experts if not store.resident(layer)[0][expert]]
    store.prefetch(layer, absent, spare=experts, counters=counters)


def _content(store):
    return {(layer, e) for layer in (0, 1) for e in store.resident(layer)[0].nonzero()[0]}


class _Replay:
    """The same cache as a list, the least recently used first; nothing is ever read."""

    def __init__(self, n_slots, pinned):
        self.room, self.pinned = n_slots - len(pinned), set(pinned)
        self.cached, self.expected = [], []
        self.hits = self.prefetches = self.prefetch_hits = 0

    def call(self, layer, experts):
        keys = [(layer, expert) for expert in experts]
        for key in [key for key in self.expected if key[0] == layer]:
            if key in keys:
                self.prefetch_hits += 1
            else:
                self.cached.remove(key)
        self.expected = [key for key in self.expected if key[0] != layer]
        hits = [key for key in keys if key in self.cached or key in self.pinned]
        self.hits += len(hits)
        for key in keys:
            if key in self.cached:
                self.cached.append(self.cached.pop(self.cached.index(key)))
            elif key not in hits:
                if len(self.cached) == self.room:
                    others = [held for held in self.cached if held not in keys]
                    self.cached.remove((others or self.cached)[0])
                self.cached.append(key)
        self.expected = [key for key in self.expected if key in self.cached]
        return keys

    def expect(self, named, layer, experts):
        keys = [(layer, expert) for expert in experts]
        for key in keys:
            if key in self.cached or key in self.pinned:
                continue
            if len(self.cached) == self.room:
                free = [held for held in self.cached if held not in (*named, *keys)]
                if not free:
                    return
                self.cached.remove(free[0])
                self.expected = [each for each in self.expected if each != free[0]]
            self.cached.append(key)
            self.expected.append(key)
            self.prefetches += 1


EXPERTS = st.lists(st.integers(0, 3), unique=True, max_size=4)
CALLS = st.lists(
    st.tuples(st.sampled_from((0, 1)), EXPERTS, st.none() | st.tuples(st.just(1), EXPERTS)),
    max_size=10,
)


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_any_calls_and_guesses_give_right_bytes_and_the_counts_of_a_plain_replay(data):
    pinned = data.draw(st.lists(st.sampled_from(KEYS), unique=True, max_size=3))
    n_slots = data.draw(st.integers(len(pinned) + 1, len(KEYS)))
    bundle, replay, counters = FakeBundle(), _Replay(n_slots, pinned), PhaseCounters()
    bundle.delay_s = {key: data.draw(st.sampled_from((0, 0.0005, 0.001))) for key in KEYS}
    n_readers = data.draw(st.integers(1, 3))
    store = RecordStore(
        bundle, form=0, n_slots=n_slots, pinned=pinned, eviction=Lru, n_readers=n_readers
    )
    try:
        n_wanted = 0
        for layer, experts, expected in data.draw(CALLS):
            n_wanted += len(experts)
            named = replay.call(layer, experts)
            if expected is not None:
                replay.expect(named, *expected)
            came = _use(store, layer, experts, expected=expected, counters=counters)
            assert sorted(came) == sorted(experts)
            assert _content(store) == {*replay.cached, *pinned}
        assert (counters.hits, counters.misses) == (replay.hits, n_wanted - replay.hits)
        assert counters.prefetches == replay.prefetches
        assert counters.prefetch_hits == replay.prefetch_hits
        demanded_bytes = counters.bytes_read - counters.prefetched_bytes
        assert demanded_bytes == counters.misses * RECORD_BYTES
        assert counters.prefetched_bytes <= counters.prefetches * RECORD_BYTES
    finally:
        store.close()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_failures_and_abandoned_calls_between_guesses_leave_the_store_in_order(data):
    n_slots = data.draw(st.integers(1, 5))
    bundle = FakeBundle()
    store = RecordStore(bundle, form=0, n_slots=n_slots, eviction=Lru, n_readers=2)
    steps = st.tuples(
        st.sampled_from((0, 1)),
        EXPERTS,
        EXPERTS,
        st.integers(0, 4),
        st.sets(st.sampled_from(KEYS), max_size=2),
    )
    try:
        for layer, wanted, guessed, n_taken, broken in data.draw(st.lists(steps, max_size=6)):
            bundle.broken = broken
            supply = store.acquire(layer, wanted, PhaseCounters())
            _expect(store, 1, guessed, PhaseCounters())
            try:
                for _ in range(n_taken):
                    expert, weights = next(supply)
                    assert (weights["up_proj"].values == tag(layer, expert)).all()
            except StopIteration:
                pass
            except CorruptArtifactError:
                del supply
        bundle.broken = set()
        # a guess may have met the broken record: the call that wants it says so, once
        for layer in (0, 1):
            try:
                _use(store, layer, range(4))
            except CorruptArtifactError:
                assert sorted(_use(store, layer, range(4))) == [0, 1, 2, 3]
        _use(store, 0, range(4))
        _use(store, 1, range(4))
        assert len(_content(store)) == n_slots
    finally:
        store.close()


def test_a_call_waits_for_a_prefetch_under_way_instead_of_reading_again(bundle, open_store):
    store, counters = open_store(n_slots=4), PhaseCounters()
    late = bundle.hold_back(1, 2)
    _use(store, 0, [0], expected=(1, [2]))
    while (1, 2) not in bundle.started:
        time.sleep(0.001)
    supply = store.acquire(1, [2], counters)
    late.set()
    expert, weights = next(supply)
    assert expert == 2 and (weights["up_proj"].values == tag(1, 2)).all()
    assert list(supply) == []
    assert bundle.started.count((1, 2)) == 1
    assert (counters.hits, counters.prefetch_hits, counters.misses) == (1, 1, 0)
    assert counters.bytes_read == counters.prefetched_bytes == RECORD_BYTES
    assert counters.stall_seconds > 0


def test_a_prefetch_begins_when_no_demanded_read_is_under_way(bundle, open_store):
    store = open_store(n_slots=6, n_readers=3)
    late = bundle.hold_back(0, 0)
    supply = store.acquire(0, [0, 1], PhaseCounters())
    _expect(store, 1, [3], PhaseCounters())
    assert next(supply)[0] == 1
    time.sleep(0.02)  # two readers have nothing else to do
    assert bundle.started == [(0, 0), (0, 1)]
    late.set()
    assert next(supply)[0] == 0
    assert _use(store, 1, [3]) == [3]
    assert bundle.started == [(0, 0), (0, 1), (1, 3)]


def test_prefetches_are_read_one_at_a_time_in_the_order_of_the_guess(bundle, open_store):
    store = open_store(n_slots=6, n_readers=3)
    late = bundle.hold_back(1, 3)
    _use(store, 0, [0], expected=(1, [3, 1]))
    time.sleep(0.02)
    assert bundle.started == [(0, 0), (1, 3)]
    late.set()
    assert sorted(_use(store, 1, [1, 3])) == [1, 3]
    assert bundle.started[2:] == [(1, 1)]


def test_a_demanded_read_does_not_wait_for_a_wrong_guess(bundle, open_store):
    store, counters = open_store(n_slots=6, n_readers=2), PhaseCounters()
    late = bundle.hold_back(1, 2)
    _use(store, 0, [0], expected=(1, [2, 3]))
    while (1, 2) not in bundle.started:
        time.sleep(0.001)
    assert _use(store, 1, [0], counters=counters) == [0]  # 2 is held back still
    late.set()
    store.close()
    assert bundle.given_up == [(1, 2)]  # after its first piece
    assert (1, 3) not in bundle.started
    assert (counters.prefetch_hits, counters.misses) == (0, 1)


def test_what_was_guessed_wrongly_is_gone_with_the_next_call(open_store):
    store = open_store(n_slots=6)
    _use(store, 0, [0], expected=(1, [2, 3]))
    assert _content(store) == {(0, 0), (1, 2), (1, 3)}
    _use(store, 1, [2])
    assert _content(store) == {(0, 0), (1, 2)}


def test_a_slot_of_a_wrong_guess_is_read_into_when_the_piece_under_way_has_come(bundle, open_store):
    store = open_store(n_slots=2, n_readers=2)
    late = bundle.hold_back(1, 2)
    _use(store, 0, [0], expected=(1, [2]))
    while (1, 2) not in bundle.started:
        time.sleep(0.001)
    supply = store.acquire(1, [0, 1], PhaseCounters())  # 0 goes where 2 is being read
    assert next(supply)[0] == 1
    threading.Timer(0.02, late.set).start()
    expert, weights = next(supply)
    assert expert == 0 and (weights["up_proj"].values == tag(1, 0)).all()
    time.sleep(0.02)
    assert (weights["up_proj"].values == tag(1, 0)).all()


@pytest.mark.parametrize("n_slots", [1, 2])
def test_nothing_is_prefetched_where_the_call_needs_every_slot(bundle, open_store, n_slots):
    store, counters = open_store(n_slots=n_slots), PhaseCounters()
    assert sorted(_use(store, 0, [0, 1], expected=(1, [2]), counters=counters)) == [0, 1]
    assert counters.prefetches == 0
    assert bundle.started == [(0, 0), (0, 1)]


def test_only_as_many_are_prefetched_as_can_be_held(open_store):
    store, counters = open_store(n_slots=3), PhaseCounters()
    _use(store, 0, [0], expected=(1, [3, 1, 2]), counters=counters)
    assert counters.prefetches == 2
    assert _content(store) == {(0, 0), (1, 3), (1, 1)}


def test_a_guess_does_not_displace_what_it_expects_itself(open_store):
    store = open_store(n_slots=3)
    for layer, expert in ((1, 3), (0, 1), (0, 0)):  # 1, 3 is the least recently used
        _use(store, layer, [expert])
    _use(store, 0, [0], expected=(1, [3, 2]))
    assert _content(store) == {(0, 0), (1, 3), (1, 2)}


def test_a_damaged_record_is_named_when_it_is_wanted_and_not_before(bundle, open_store):
    store = open_store(n_slots=6)
    bundle.broken = {(1, 2), (1, 3)}
    _use(store, 0, [0], expected=(1, [2]))
    with pytest.raises(CorruptArtifactError, match="layer 1 expert 2"):
        _use(store, 1, [2])
    assert not store.resident(1)[0].any()
    _use(store, 0, [0], expected=(1, [3]))
    assert _use(store, 1, [0]) == [0]  # 3 turned out not to be wanted
    bundle.broken = set()
    assert _use(store, 1, [2]) == [2]


def test_closing_joins_the_threads_in_the_middle_of_a_prefetch(bundle):
    before = threading.active_count()
    store = RecordStore(bundle, form=0, n_slots=6, eviction=Lru)
    bundle.delay_s[1, 2] = 0.02
    _use(store, 0, [0], expected=(1, [2, 3]))
    store.close()
    assert threading.active_count() == before
