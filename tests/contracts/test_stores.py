"""What holds of every store of experts: slots, eviction, order of arrival, errors, close."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_tool.artifacts.precision import NativePrecision
from moe_tool.artifacts.run_stats import PhaseCounters
from moe_tool.errors import CorruptArtifactError
from moe_tool.policies.eviction import Lru, parse_eviction
from moe_tool.store.channel_store import ChannelStore
from moe_tool.store.form_stores import FormStores
from moe_tool.store.record_store import RecordStore
from tests.runtime.test_device_store import DeviceStore
from tests.store.fake_bundle import CHANNELS, FakeBundle, is_whole

KEYS = [(layer, expert) for layer in (0, 1) for expert in range(4)]
EVEN, ODD = [key for key in KEYS if not key[1] % 2], [key for key in KEYS if key[1] % 2]
NATIVE = NativePrecision()
TABLES = {
    "records": [("primary", NATIVE, KEYS)],
    "channels": [("primary", CHANNELS, KEYS), ("selector", CHANNELS, KEYS)],
    "device": [("primary", NATIVE, KEYS)],
    "forms": [("primary", NATIVE, KEYS), ("replica", NATIVE, KEYS)],
    "mixed": [("primary", NATIVE, EVEN), ("primary", NATIVE, ODD)],
}
KINDS = sorted(TABLES)


class _Case:
    """A store of one kind over a bundle in memory."""

    def __init__(self, kind, *, n_slots, pinned=(), eviction=Lru):
        self.bundle = FakeBundle(tables=TABLES[kind])
        self.n_slots = n_slots
        self.store = self._open(kind, n_slots, list(pinned), eviction)

    def _open(self, kind, n_slots, pinned, eviction):
        bundle, options = self.bundle, {"n_slots": n_slots, "pinned": pinned, "eviction": eviction}
        if kind == "records":
            return RecordStore(bundle, form=0, **options)
        if kind == "channels":
            return ChannelStore(bundle, form=0, **options)
        if kind == "device":
            return DeviceStore(bundle, form=0, **options)
        if kind == "forms":
            cheaper = RecordStore(bundle, form=1, n_slots=4, pinned=KEYS[:4], eviction=Lru)
            primaries = [RecordStore(bundle, form=0, **options)]
            primary_of = {layer: [0] * 4 for layer in (0, 1)}
            return FormStores(primaries, [cheaper], primary_of=primary_of)
        primaries = [
            RecordStore(
                bundle,
                form=form,
                n_slots=n_slots,
                pinned=[key for key in pinned if key[1] % 2 == form],
                eviction=eviction,
            )
            for form in (0, 1)
        ]
        return FormStores(primaries, primary_of={layer: [0, 1, 0, 1] for layer in (0, 1)})

    def use(self, layer, experts, counters=None):
        """Return the experts in the order in which they came, each checked twice."""
        counters = PhaseCounters() if counters is None else counters
        came = []
        for expert, stored in self.store.acquire(layer, experts, counters):
            form = expert % 2 if len(self.bundle.forms) == 2 and self._is_mixed else 0
            assert is_whole(stored, layer, expert, form)
            time.sleep(0.0003)  # computing; a read into this slot would show
            assert is_whole(stored, layer, expert, form)
            came.append(expert)
        return came

    @property
    def _is_mixed(self):
        return self.bundle.forms[1].table.role == "primary"

    @property
    def record_bytes(self):
        return self.bundle.forms[0].record_size_bytes

    def content(self):
        """Return the experts whose primary forms are in memory."""
        return {(at, e) for at in (0, 1) for e in self.store.resident(at)[0].nonzero()[0].tolist()}


@pytest.fixture(params=KINDS)
def open_case(request):
    cases = []

    def build(**options):
        cases.append(_Case(request.param, **options))
        return cases[-1]

    yield build
    for case in cases:
        for event in case.bundle.held_back.values():
            event.set()
        case.store.close()


CALLS = st.lists(
    st.tuples(st.sampled_from((0, 1)), st.lists(st.integers(0, 3), unique=True, max_size=4)),
    max_size=7,
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(
    calls=CALLS,
    n_slots=st.integers(2, 8),
    pinned=st.sampled_from([(), ((0, 1),)]),
    delays=st.lists(st.sampled_from((0, 0.001)), min_size=8, max_size=8),
    eviction=st.sampled_from(["lru", "lfu", "s3-fifo"]),
)
def test_content_and_counts_follow_from_the_calls_and_not_from_the_order_of_arrival(
    kind, calls, n_slots, pinned, delays, eviction
):
    seen = []
    for waits in ([0.0] * 8, delays):
        case = _Case(kind, n_slots=n_slots, pinned=pinned, eviction=parse_eviction(eviction).make)
        case.bundle.delay_s = dict(zip(KEYS, waits, strict=True))
        counters, contents = PhaseCounters(), []
        try:
            for layer, wanted in calls:
                before, hits = case.content(), counters.hits
                assert sorted(case.use(layer, wanted, counters)) == sorted(wanted)
                assert counters.hits - hits == sum((layer, e) in before for e in wanted)
                content = case.content()
                assert set(pinned) <= content
                assert len(content) <= n_slots * (2 if kind == "mixed" else 1)
                contents.append(content)
        finally:
            case.store.close()
        assert counters.hits + counters.misses == sum(len(wanted) for _, wanted in calls)
        assert counters.bytes_read == counters.misses * case.record_bytes
        seen.append((contents, counters.hits, counters.misses))
    assert seen[0] == seen[1]


def test_masks_have_a_row_for_every_form_and_are_copies(open_case):
    case = open_case(n_slots=4, pinned=[(0, 1)])
    case.store.load_pinned()
    n_forms = 2 if case.bundle.forms[-1].table.role == "replica" else 1
    for mask in (case.store.resident(0), case.store.pinned_mask(0)):
        assert mask.shape == (n_forms, 4) and mask.dtype == np.bool_
        assert mask[0].tolist() == [False, True, False, False]
        mask[:] = False
    assert case.store.resident(0)[0, 1] and case.store.pinned_mask(0)[0, 1]
    assert case.store.hints == frozenset()


def test_pinned_experts_are_read_once_counted_nowhere_and_never_leave(open_case):
    case = open_case(n_slots=3, pinned=[(0, 1), (1, 0)])
    case.store.load_pinned()
    case.store.load_pinned()
    counters = PhaseCounters()
    for layer in (0, 1, 0, 1):
        case.use(layer, range(4), counters)
    assert case.bundle.started.count((0, 1)) - _in_other_forms(case) == 1
    assert {(0, 1), (1, 0)} <= case.content()
    assert counters.hits >= 4


def _in_other_forms(case):
    return int(case.bundle.forms[-1].table.role == "replica")


def test_a_damaged_record_is_named_and_the_store_stays_usable(open_case):
    case = open_case(n_slots=3)
    case.bundle.broken = {(1, 2)}
    with pytest.raises(CorruptArtifactError, match="layer 1 expert 2"):
        case.use(1, [0, 2])
    assert (1, 2) not in case.content()
    case.bundle.broken = set()
    assert sorted(case.use(1, [2, 0])) == [0, 2]


def test_a_call_left_in_the_middle_ends_with_the_next_one(open_case):
    case = open_case(n_slots=2)
    supply = case.store.acquire(0, [0, 1, 2, 3], PhaseCounters())
    next(supply)
    assert sorted(case.use(0, [3, 2])) == [2, 3]
    untouched = case.store.acquire(1, [0, 1, 2, 3], PhaseCounters())
    assert sorted(case.use(0, [1])) == [1]
    del untouched
    assert sorted(case.use(1, range(4))) == [0, 1, 2, 3]


def test_a_prefetched_expert_is_a_hit_if_it_is_named_and_is_gone_if_not(open_case):
    case, counters = open_case(n_slots=4), PhaseCounters()
    case.use(0, [0], counters)
    case.store.prefetch(1, [1, 2], spare=[1, 2], counters=counters)
    assert {(1, 1), (1, 2)} <= case.content()
    assert sorted(case.use(1, [1, 3], counters)) == [1, 3]
    assert (counters.prefetches, counters.prefetch_hits) == (2, 1)
    assert (counters.hits, counters.misses) == (1, 2)
    assert (1, 2) not in case.content() and (0, 0) in case.content()
    assert counters.prefetched_bytes >= case.record_bytes
    read_twice = counters.bytes_read - counters.prefetched_bytes
    assert read_twice == 2 * case.record_bytes


def test_what_the_call_under_way_uses_is_not_displaced_by_a_prefetch(open_case):
    case, counters = open_case(n_slots=2), PhaseCounters()
    supply = case.store.acquire(0, [0, 2], counters)
    next(supply)
    case.store.prefetch(1, [0, 2], spare=[0, 2], counters=counters)
    assert {(0, 0), (0, 2)} <= case.content()
    assert len(list(supply)) == 1


def test_predictions_are_taken_in_whatever_the_policy_does_with_them(open_case):
    case = open_case(n_slots=3, eviction=parse_eviction("expertflow").make)
    assert case.store.hints == frozenset({"predictions"})
    for layer in (0, 1, 0):
        case.use(layer, [0, 1])
        case.store.expect(1 - layer, [0, 2], ahead=1)
    assert len(case.content()) <= 6


def test_selecting_channels_of_whole_experts_changes_nothing():
    for kind in ("records", "forms", "mixed", "device"):
        case = _Case(kind, n_slots=4)
        case.store.select_channels(0, [0, 1], lambda selector: pytest.fail("there is none"))
        assert sorted(case.use(0, [0, 1])) == [0, 1]
        case.store.close()


def test_closing_joins_the_threads_in_the_middle_of_a_call_and_twice(open_case):
    before = threading.active_count()
    case = open_case(n_slots=2)
    next(case.store.acquire(0, [0, 1, 2], PhaseCounters()))
    assert threading.active_count() > before
    case.store.close()
    case.store.close()
    assert threading.active_count() == before


def test_a_cheaper_form_is_numbered_after_the_primary_ones_and_comes_first():
    case, counters = _Case("forms", n_slots=2), PhaseCounters()
    case.store.load_pinned()
    assert case.store.resident(0).tolist() == [[False] * 4, [True] * 4]
    came = []
    for number, stored in case.store.acquire(0, [1, 4, 7], counters):
        form, expert = divmod(number, 4)
        assert is_whole(stored, 0, expert, form)
        came.append(number)
    assert came[-1] == 1 and sorted(came) == [1, 4, 7]
    assert (counters.hits, counters.misses) == (2, 1)
    case.store.close()


@pytest.mark.parametrize("in_step", [False, True])
def test_a_prefetched_cheaper_form_is_settled_by_its_own_layers_call(in_step):
    bundle, counters = FakeBundle(tables=TABLES["forms"]), PhaseCounters()
    whole, cheaper = (RecordStore(bundle, form=form, n_slots=4, eviction=Lru) for form in (0, 1))
    primary_of = {layer: [0] * 4 for layer in (0, 1)}
    store = FormStores([whole], [cheaper], primary_of=primary_of, in_step=in_step)
    list(store.acquire(0, [0], counters))
    store.prefetch(1, [1, 4 + 2, 4 + 3], spare=[1, 4 + 2, 4 + 3], counters=counters)
    expected = [[False, True, False, False], [False, False, True, True]]
    assert store.resident(1).tolist() == expected
    list(store.acquire(0, [3], counters))  # of another layer: nothing is settled
    assert store.resident(1).tolist() == expected
    came = dict(store.acquire(1, [0, 4 + 2], counters))
    assert is_whole(came[4 + 2], 1, 2, form=1) and is_whole(came[0], 1, 0)
    assert store.resident(1).tolist() == [[True] + [False] * 3, [False, False, True, False]]
    assert (counters.prefetches, counters.prefetch_hits) == (3, 1)
    store.prefetch(1, [4 + 3], spare=[4 + 3], counters=counters)
    list(store.acquire(1, [0], counters))  # the call names no cheaper form at all
    assert store.resident(1)[1].tolist() == [False, False, True, False]
    store.close()


def test_a_removed_expert_is_neither_prefetched_nor_expected():
    tables = [("primary", NATIVE, [key for key in KEYS if key[1] != 3])]
    bundle, counters = FakeBundle(tables=tables), PhaseCounters()
    records = RecordStore(bundle, form=0, n_slots=4, eviction=Lru)
    store = FormStores([records], primary_of={layer: [0, 0, 0, None] for layer in (0, 1)})
    list(store.acquire(0, [0], counters))
    store.prefetch(1, [3, 1], spare=[3, 1], counters=counters)
    store.expect(1, [3], ahead=1)
    assert counters.prefetches == 1 and store.resident(1)[0].tolist() == [False, True, False, False]
    store.close()
