"""Stalls and totals, by hand."""

import numpy as np
import pytest

from moe_tool.artifacts.access_trace import CallCounts
from moe_tool.simulator.time_model import CallCosts, call_times, forward_seconds
from tests.simulator.random_traces import trace_of

COSTS = CallCosts(
    forward_s=100.0, layer_s=10.0, expert_s=2.0, read_one_s=5.0, read_s=4.0, waking_s=0.0, wait_s=1
)


def _times(hits, *, prefetches=None, prefetch_hits=None, experts=3, costs=COSTS):
    n_calls = len(hits)
    calls = [(0, list(range(experts))) for _ in range(n_calls)]
    trace = trace_of(calls, n_layers=1, n_experts=4)
    counts = CallCounts.zeros(n_calls)
    counts.hits[:] = hits
    counts.prefetches[:] = prefetches or 0
    counts.prefetch_hits[:] = prefetch_hits or 0
    return trace, call_times(trace, counts, costs)


def test_hits_alone_stall_nobody():
    _, times = _times([3])
    assert times.stall.tolist() == [0.0] and times.total.tolist() == [16.0]


def test_a_single_miss_is_read_while_the_hits_are_computed():
    _, times = _times([2])  # there after 5, the hits are done after 4
    assert times.stall.tolist() == [1.0] and times.total.tolist() == [17.0]


def test_two_misses_come_together_and_a_third_alone():
    _, times = _times([1, 0])
    # Two at 8, the hit is done at 2; the second of the pair waits for nothing.
    assert times.stall[0] == 6.0
    # Three: a pair at 8, computed until 12, the third at 8 + 5.
    assert times.stall[1] == 8.0 + 1.0


def test_who_waits_wakes_up_slowly():
    costs = CallCosts(
        forward_s=0, layer_s=10, expert_s=2, read_one_s=5, read_s=4, waking_s=3, wait_s=4
    )
    _, times = _times([2, 0], costs=costs)
    assert times.total.tolist() == [10 + 6 + 1 + 3 * 1 / 4, 10 + 6 + 9 + 3]


def test_a_prefetch_has_the_time_that_the_disk_is_free():
    # The first call takes 16 and reads nothing: three records can be read ahead, at 5 each.
    _, times = _times([3, 3], prefetches=[4, 0], prefetch_hits=[0, 2])
    assert times.prefetched.tolist() == [3.2, 0.0]
    assert times.stall[1] == pytest.approx(2 * (1 - 0.8) * 5)


def test_a_forward_is_the_sum_of_its_layers():
    trace = trace_of([(0, [0]), (1, [0]), (0, [1]), (1, [1])], n_layers=2, n_experts=2)
    counts = CallCounts.zeros(4)
    counts.hits[:] = [1, 1, 0, 0]
    seconds = forward_seconds(trace, call_times(trace, counts, COSTS), COSTS)
    assert seconds.tolist() == [100 + 2 * 12, 100 + 2 * (12 + 5)]


def test_an_empty_trace_takes_no_time():
    trace = trace_of([], n_layers=1, n_experts=2)
    times = call_times(trace, CallCounts.zeros(0), COSTS)
    assert times.total.shape == (0,) and np.isfinite(times.stall).all()
