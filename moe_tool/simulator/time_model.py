"""How long a layer call takes, from what it finds in memory."""

from dataclasses import dataclass

import numpy as np

from moe_tool.simulator.access_trace import AccessTrace
from moe_tool.simulator.counts import CallCounts

_N_READERS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class CallCosts:
    """Costs of one model on one machine, one token at a time."""

    forward_s: float
    """Per forward: the skeleton's matrices"""
    layer_s: float
    """Per layer call beside matrices"""
    expert_s: float
    """Per expert that is computed"""
    read_one_s: float
    """Per record while nothing else is read"""
    read_s: float
    """Per record while several are"""
    waking_s: float
    """Added to a call that waits for `wait_s` or more, in part to one that waits less"""
    wait_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CallTimes:
    """[C] float64 seconds each."""

    stall: np.ndarray
    """In which the computation waits for a read"""
    total: np.ndarray
    prefetched: np.ndarray
    """Records that were read ahead, not seconds: those that the disk had time for"""


def call_times(trace: AccessTrace, counts: CallCounts, costs: CallCosts) -> CallTimes:
    """Return what every call takes.

    Experts in memory are computed while the others are read; these are computed as they arrive. Two
    readers share the disk, so that records come in pairs. What is read ahead has the time that the
    demanded reads of its call leave, until the next call begins; what is still to come then is
    waited for, and what nobody wants any more is given up.
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
    # Time in which the disk is free: the call's, less what its own records take.
    idle = np.maximum(0.0, compute + stall - misses * costs.read_s)
    done = np.minimum(prefetches, idle / costs.read_one_s)
    left = np.divide(done, prefetches, out=np.ones_like(done), where=prefetches > 0)
    before = np.concatenate([[1.0], left[:-1]]) if len(left) else left
    stall = stall + counts.prefetch_hits * (1.0 - before) * costs.read_one_s
    return CallTimes(stall=stall, total=compute + stall, prefetched=done)


def forward_seconds(trace: AccessTrace, times: CallTimes, costs: CallCosts) -> np.ndarray:
    """Return what every forward takes, [F] float64."""
    sums = np.bincount(trace.forward, weights=times.total, minlength=trace.n_forwards)
    seconds: np.ndarray = sums + costs.forward_s
    return seconds


def _stall(n_hits: int, n_misses: int, costs: CallCosts) -> float:
    now, stall = n_hits * costs.expert_s, 0.0
    for arrival in _arrivals(n_misses, costs):
        stall += max(0.0, arrival - now)
        now = max(now, arrival) + costs.expert_s
    return stall


def _arrivals(n_misses: int, costs: CallCosts) -> list[float]:
    """When each demanded record is there, counted from the beginning of the call."""
    n_pairs, is_odd = divmod(n_misses, _N_READERS)
    arrivals = [
        (pair + 1) * _N_READERS * costs.read_s for pair in range(n_pairs) for _ in range(_N_READERS)
    ]
    if is_odd:
        arrivals.append(n_pairs * _N_READERS * costs.read_s + costs.read_one_s)
    return arrivals
