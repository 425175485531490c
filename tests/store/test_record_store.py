"""The store over a bundle in memory: what it yields, counts, evicts and survives."""

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_tool.artifacts.run_stats import PhaseCounters
from moe_tool.errors import BudgetError, CorruptArtifactError
from moe_tool.policies.eviction import Lru
from moe_tool.store import record_store
from moe_tool.store.record_store import RecordStore
from tests.store.fake_bundle import RECORD_BYTES, FakeBundle, tag


@pytest.fixture
def open_store():
    stores = []

    def build(bundle, **options):
        stores.append(RecordStore(bundle, form=0, eviction=Lru, **options))
        return stores[-1]

    yield build
    for store in stores:
        store.close()


def _is_whole(weights, layer, expert):
    return (weights["up_proj"].values == tag(layer, expert)).all().item()


def _use(store, layer, experts, counters=None):
    """Return the experts in the order in which they came, each checked twice."""
    came = []
    for expert, weights in store.acquire(layer, experts, counters or PhaseCounters()):
        assert _is_whole(weights, layer, expert)
        time.sleep(0.0003)  # computing; a read into this slot would show
        assert _is_whole(weights, layer, expert)
        came.append(expert)
    return came


def _replay(calls, n_slots, pinned):
    """A cache in a dozen lines: hits at the start of each call, recency in the order of naming."""
    cached, n_hits, contents = [], 0, []
    for layer, experts in calls:
        keys = [(layer, expert) for expert in experts]
        present = [key for key in keys if key in cached or key in pinned]
        n_hits += len(present)
        for key in keys:
            if key in cached:
                cached.append(cached.pop(cached.index(key)))
            elif key not in present:
                if len(cached) == n_slots - len(pinned):
                    others = [held for held in cached if held not in keys]
                    cached.remove((others or cached)[0])
                cached.append(key)
        contents.append(set(cached) | set(pinned))
    return n_hits, contents


KEYS = [(layer, expert) for layer in (0, 1) for expert in range(4)]


@settings(max_examples=90, deadline=None)
@given(data=st.data())
def test_any_access_sequence_gives_right_bytes_and_the_hits_of_a_plain_replay(data):
    pinned = data.draw(st.lists(st.sampled_from(KEYS), unique=True, max_size=3))
    n_slots = data.draw(st.integers(len(pinned) + 1, len(KEYS)))
    experts = st.lists(st.integers(0, 3), unique=True, max_size=4)
    calls = data.draw(st.lists(st.tuples(st.sampled_from((0, 1)), experts), max_size=8))
    bundle = FakeBundle()
    bundle.delay_s = {key: data.draw(st.sampled_from((0, 0.0005, 0.001))) for key in KEYS}
    store = RecordStore(
        bundle,
        form=0,
        n_slots=n_slots,
        pinned=pinned,
        eviction=Lru,
        n_readers=data.draw(st.integers(1, 3)),
    )
    try:
        counters = PhaseCounters()
        n_hits, contents = _replay(calls, n_slots, pinned)
        for (layer, wanted), content in zip(calls, contents, strict=True):
            assert sorted(_use(store, layer, wanted, counters)) == sorted(wanted)
            found = {(at, e) for at in (0, 1) for e in store.resident(at)[0].nonzero()[0]}
            assert found == content and len(found) <= n_slots
        n_wanted = sum(len(wanted) for _, wanted in calls)
        assert (counters.hits, counters.misses) == (n_hits, n_wanted - n_hits)
        assert counters.bytes_read == counters.misses * RECORD_BYTES
    finally:
        store.close()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_failures_and_abandoned_calls_leave_the_store_in_order(data):
    n_slots = data.draw(st.integers(1, 5))
    bundle = FakeBundle()
    store = RecordStore(bundle, form=0, n_slots=n_slots, eviction=Lru, n_readers=2)
    steps = st.tuples(
        st.sampled_from((0, 1)),
        st.lists(st.integers(0, 3), unique=True, max_size=4),
        st.integers(0, 4),
        st.sets(st.sampled_from(KEYS), max_size=2),
    )
    try:
        for layer, wanted, n_taken, broken in data.draw(st.lists(steps, max_size=6)):
            bundle.broken = broken
            supply = store.acquire(layer, wanted, PhaseCounters())
            try:
                for _ in range(n_taken):
                    expert, weights = next(supply)
                    assert _is_whole(weights, layer, expert)
            except StopIteration:
                pass
            except CorruptArtifactError:
                del supply
        bundle.broken = set()
        for layer in (0, 1):
            assert sorted(_use(store, layer, range(4))) == [0, 1, 2, 3]
        assert sum(store.resident(layer)[0].sum() for layer in (0, 1)) == n_slots
    finally:
        store.close()


def test_experts_in_memory_come_first_while_the_others_are_read(open_store):
    bundle = FakeBundle()
    store = open_store(bundle, n_slots=4)
    _use(store, 0, [2])
    bundle.has_started.clear()
    arrives = bundle.hold_back(0, 1)
    supply = store.acquire(0, [1, 2], PhaseCounters())
    assert next(supply)[0] == 2
    assert bundle.has_started.wait(600) and bundle.started[-1] == (0, 1)
    arrives.set()
    assert next(supply)[0] == 1


def test_reads_begin_in_the_order_in_which_experts_are_named(open_store):
    bundle = FakeBundle()
    store = open_store(bundle, n_slots=4, n_readers=1)
    _use(store, 0, [1])
    assert _use(store, 0, [2, 0, 1, 3]) == [1, 2, 0, 3]
    assert bundle.started == [(0, 1), (0, 2), (0, 0), (0, 3)]


def test_reads_begin_before_the_first_expert_is_asked_for(open_store):
    bundle = FakeBundle()
    store = open_store(bundle, n_slots=4)
    supply = store.acquire(0, [1], PhaseCounters())
    assert bundle.has_started.wait(600)
    assert next(supply)[0] == 1


def test_reads_that_have_not_begun_are_given_up_with_their_call(open_store):
    bundle = FakeBundle()
    store = open_store(bundle, n_slots=4, n_readers=1)
    late = bundle.hold_back(0, 0)
    store.acquire(0, [0, 1, 2], PhaseCounters())
    assert bundle.has_started.wait(600)
    threading.Timer(0.02, late.set).start()
    assert _use(store, 1, [3]) == [3]
    assert bundle.started == [(0, 0), (1, 3)]
    assert store.resident(0)[0].tolist() == [True, False, False, False]


def test_missing_experts_come_in_order_of_arrival(open_store):
    bundle = FakeBundle()
    store = open_store(bundle, n_slots=4, n_readers=2)
    late = bundle.hold_back(0, 1)
    supply = store.acquire(0, [1, 3], PhaseCounters())
    assert next(supply)[0] == 3
    late.set()
    assert next(supply)[0] == 1


def test_what_is_evicted_does_not_depend_on_the_order_of_arrival(open_store):
    contents = []
    for slow in range(3):
        bundle = FakeBundle()
        bundle.delay_s[0, slow] = 0.02
        store = open_store(bundle, n_slots=2, n_readers=3)
        _use(store, 0, [0, 1, 2])
        contents.append(store.resident(0)[0].tolist())
    assert contents == [[False, True, True, False]] * 3


def test_one_slot_serves_any_number_of_experts(open_store):
    store = open_store(FakeBundle(), n_slots=1)
    counters = PhaseCounters()
    assert _use(store, 0, [3, 1, 2, 0], counters) == [3, 1, 2, 0]
    assert _use(store, 0, [1, 0], counters) == [0, 1]  # 0 is still there
    assert (counters.hits, counters.misses) == (1, 5)


class _Clocked(FakeBundle):
    """A bundle whose reads move the clock by a second each; one that is held back is let go when
    somebody looks at the clock."""

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.has_ended = threading.Event()

    def read_record_into(self, layer, expert, out, **options):
        super().read_record_into(layer, expert, out, **options)
        self.now += 1.0
        self.has_ended.set()

    def perf_counter(self):
        now = self.now
        for waiting in self.held_back.values():
            waiting.set()
        return now


def test_waiting_for_a_read_is_stall_and_computing_beside_it_is_not(open_store, monkeypatch):
    bundle = _Clocked()
    monkeypatch.setattr(record_store, "time", bundle)
    store = open_store(bundle, n_slots=4)
    idle, busy, none = PhaseCounters(), PhaseCounters(), PhaseCounters()
    bundle.hold_back(0, 0)
    _use(store, 0, [0], idle)
    assert idle.stall_seconds == 1
    bundle.has_ended.clear()
    for expert, _ in store.acquire(0, [0, 1], busy):
        if expert == 0:
            assert bundle.has_ended.wait(600)  # the read of expert 1 ends meanwhile
    assert bundle.now == 2 and busy.stall_seconds == 0
    _use(store, 0, [0, 1], none)
    assert none.stall_seconds == 0 and none.bytes_read == 0


def test_a_damaged_record_is_named_and_the_store_stays_usable(open_store):
    bundle = FakeBundle()
    store = open_store(bundle, n_slots=2)
    bundle.broken = {(1, 2)}
    with pytest.raises(CorruptArtifactError, match="layer 1 expert 2"):
        _use(store, 1, [2])
    assert not store.resident(1)[0].any()
    bundle.broken = set()
    assert _use(store, 1, [2]) == [2]


def test_a_call_left_in_the_middle_ends_with_the_next_one(open_store):
    bundle = FakeBundle()
    store = open_store(bundle, n_slots=2, n_readers=1)
    supply = store.acquire(0, [0, 1, 2, 3], PhaseCounters())
    next(supply)
    assert sorted(_use(store, 0, [3, 2])) == [2, 3]
    with pytest.raises(StopIteration):
        next(supply)


def test_pinned_experts_are_read_once_in_file_order_and_never_leave(open_store):
    order = [(0, 3), (1, 1), (0, 0), (1, 0), (0, 1), (0, 2), (1, 2), (1, 3)]
    bundle = FakeBundle(file_order=order)
    store = open_store(bundle, n_slots=3, pinned=[(0, 0), (0, 3)], n_readers=1)
    progress = _Recorded()
    store.load_pinned(progress)
    assert bundle.started == [(0, 3), (0, 0)]
    assert progress.said == [("begin", 2), "advance", "advance", "end"]
    counters = PhaseCounters()
    for layer in (1, 0):
        _use(store, layer, range(4), counters)
    assert bundle.started.count((0, 0)) == bundle.started.count((0, 3)) == 1
    assert (counters.hits, counters.misses) == (2, 6)
    assert store.pinned_mask(0)[0].tolist() == [True, False, False, True]
    assert store.pinned_mask(1)[0].tolist() == [False] * 4
    assert store.resident(0)[0][[0, 3]].all()


def test_pinned_experts_are_read_with_the_first_call_at_the_latest(open_store):
    bundle = FakeBundle()
    store = open_store(bundle, n_slots=2, pinned=[(0, 0)])
    counters = PhaseCounters()
    assert _use(store, 0, [1, 0], counters) == [0, 1]
    assert (counters.hits, counters.misses, counters.bytes_read) == (1, 1, RECORD_BYTES)


def test_a_damaged_pinned_record_is_named_and_read_again_next_time(open_store):
    bundle = FakeBundle()
    store = open_store(bundle, n_slots=3, pinned=[(0, 0), (1, 1)])
    bundle.broken = {(1, 1)}
    with pytest.raises(CorruptArtifactError, match="layer 1 expert 1"):
        store.load_pinned()
    bundle.broken = set()
    assert sorted(_use(store, 0, range(4))) == [0, 1, 2, 3]
    assert store.resident(1)[0].tolist() == [False, True, False, False]


def test_every_expert_may_be_pinned(open_store):
    store = open_store(FakeBundle(), n_slots=8, pinned=KEYS)
    counters = PhaseCounters()
    assert _use(store, 1, range(4), counters) == [0, 1, 2, 3]
    assert (counters.hits, counters.misses) == (4, 0)


@pytest.mark.parametrize(("n_slots", "n_pinned"), [(0, 0), (2, 2), (7, 7)])
def test_slots_that_pinned_experts_fill_are_refused(n_slots, n_pinned):
    with pytest.raises(BudgetError, match=f"{n_slots} expert slots"):
        RecordStore(FakeBundle(), form=0, n_slots=n_slots, pinned=KEYS[:n_pinned], eviction=Lru)


def test_masks_are_copies(open_store):
    store = open_store(FakeBundle(), n_slots=2, pinned=[(0, 0)])
    store.resident(0)[0][:] = False
    store.pinned_mask(0)[0][:] = False
    assert store.resident(0)[0][0] and store.pinned_mask(0)[0][0]


def test_closing_joins_the_threads_even_in_the_middle_of_a_call():
    before = threading.active_count()
    bundle = FakeBundle()
    store = RecordStore(bundle, form=0, n_slots=2, eviction=Lru, n_readers=3)
    next(store.acquire(0, [0, 1, 2], PhaseCounters()))
    assert threading.active_count() > before
    store.close()
    store.close()
    assert threading.active_count() == before


class _Recorded:
    def __init__(self):
        self.said = []

    def begin(self, task, total, unit):
        self.said.append(("begin", total))

    def advance(self, amount=1):
        self.said.append("advance")

    def end(self):
        self.said.append("end")

    def note(self, text):
        self.said.append("note")
