"""Time model of a layer call, from its hits, misses and prefetches."""

from dataclasses import dataclass

import numpy as np

from moe_tool.artifacts.access_trace import AccessTrace, CallCounts

_N_READERS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class CallCosts:
    """Seconds of the steps of one model on one machine, one token at a time."""

    forward_s: float
    """Time per forward of the skeleton's matrices"""
    layer_s: float
    """Time per layer call without matrices"""
    expert_s: float
    """Time per computed expert"""
    read_one_s: float
    """Time to read a record alone"""
    read_s: float
    """Time per record while several are read"""
    waking_s: float
    """Extra time of a call that waits `wait_s` or more for reads; less in proportion below"""
    wait_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CallTimes:
    """Times of C layer calls, [C] float64 seconds each."""

    stall: np.ndarray
    """Time that the computation waits for reads"""
    total: np.ndarray
    prefetched: np.ndarray
    """Number of records, not seconds: prefetches that the disk had time for"""


def call_times(trace: AccessTrace, counts: CallCounts, costs: CallCosts) -> CallTimes:
    """Return the times of every call.

    Experts in memory are computed while the others are read; these are computed as they arrive. Two
    readers share the disk, so records arrive in pairs. Prefetches use the disk when demand reads
    leave it idle, until the next call begins; that call waits for those it needs and cancels the
    others.
    """
    hits = counts.hits.astype(np.int64)
    misses = trace.sizes - hits
    width = int(trace.sizes.max()) + 1 if len(hits) else 1
    pairs, which = np.unique(hits * width + misses, return_inverse=True)
    table = np.array([_stall(*divmod(int(pair), width), costs) for pair in pairs])
    stall = table[which] if len(table) else np.zeros(0)
    waking = costs.waking_s * np.minimum(1.0, stall / costs.wait_s)
    compute = costs.layer_s + trace.sizes * costs.expert_s + waking
    prefetches = counts.prefetches.astype(np.float64)
    # Time in which the disk is idle: the call minus the reads of its own records.
    idle = np.maximum(0.0, compute + stall - misses * costs.read_s)
    done = np.minimum(prefetches, idle / costs.read_one_s)
    left = np.divide(done, prefetches, out=np.ones_like(done), where=prefetches > 0)
    before = np.concatenate([[1.0], left[:-1]]) if len(left) else left
    stall = stall + counts.prefetch_hits * (1.0 - before) * costs.read_one_s
    return CallTimes(stall=stall, total=compute + stall, prefetched=done)


def forward_seconds(trace: AccessTrace, times: CallTimes, costs: CallCosts) -> np.ndarray:
    """Return the seconds of every forward, [F] float64."""
    sums = np.bincount(trace.forward, weights=times.total, minlength=trace.n_forwards)
    seconds: np.ndarray = sums + costs.forward_s
    return seconds


def _stall(n_hits: int, n_misses: int, costs: CallCosts) -> float:
    now, stall = n_hits * costs.expert_s, 0.0  # since the beginning of the call
    for number in range(n_misses):
        arrival = (number // _N_READERS + 1) * _N_READERS * costs.read_s
        if number == n_misses - 1 and n_misses % _N_READERS:
            arrival = number * costs.read_s + costs.read_one_s
        stall += max(0.0, arrival - now)
        now = max(now, arrival) + costs.expert_s
    return stall
