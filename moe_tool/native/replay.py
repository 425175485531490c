"""Compiled replay of layer calls through an expert cache, on checked arrays."""

import struct
from collections.abc import Sequence

import numpy as np

from moe_tool.artifacts.access_trace import AccessTrace, CallCounts
from moe_tool.native import kernels

COMPILED = {
    "lru": 0,
    "fifo": 1,
    "lfu": 2,
    "hobbit": 3,
    "layer-lru": 4,
    "smoe": 5,
    "expertflow": 6,
    "s3-fifo": 7,
}
"""Eviction rules that are compiled, by name, with their codes in replay.h"""
_N_PARAMETERS = 8


class Calls:
    """Layer calls described for the compiled replay; keeps the arrays alive."""

    def __init__(self, trace: AccessTrace) -> None:
        """Check the arrays of a trace and describe them.

        Raises:
            ValueError: they do not fit together.
        """
        self.trace = trace
        n_experts, layer, guesses = trace.n_experts, trace.layer, trace.guesses
        _require(trace.n_layers > 0 and n_experts > 0, "there are no experts")
        _require(not len(layer) or _within(layer, trace.n_layers), "a layer does not exist")
        _require_ranges(trace, trace.start, trace.keys)
        if trace.guess_start is not None and guesses is not None:
            _require_ranges(trace, trace.guess_start, guesses)
            owner = np.repeat(layer, np.diff(trace.guess_start))
            _require(bool((guesses // n_experts > owner).all()), "a guess is not about a layer on")
        if trace.scores is not None:
            right_shape = trace.scores.shape == (trace.n_calls, n_experts)
            _require(right_shape, "the scores have another shape")
        begins_right = trace.begins is None or len(trace.begins) == trace.n_calls
        _require(begins_right, "the beginnings of sequences do not fit")
        self._arrays = [
            None if array is None else np.ascontiguousarray(array, dtype=dtype)
            for array, dtype in (
                (layer, np.int32),
                (trace.start, np.int64),
                (trace.keys, np.int32),
                (trace.scores, np.uint16),
                (trace.guess_start, np.int64),
                (guesses, np.int32),
                (trace.begins, np.uint8),
            )
        ]
        addresses = [_address(array) for array in self._arrays]
        self.packed = struct.pack("=q2i7Q", trace.n_calls, trace.n_layers, n_experts, *addresses)


def compiled_replay(
    calls: Calls,
    eviction: str,
    parameters: Sequence[int],
    *,
    capacity: int,
    per_layer: bool,
    pinned: np.ndarray | None,
    prefetch_depth: int,
) -> CallCounts:
    """Return the counts of every call.

    Args:
        eviction: key of COMPILED.
        parameters: the policy's parameters, in its order.
        capacity: cached experts, pinned ones not counted.
        pinned: [L * E] bool, experts that are never evicted.

    Raises:
        ValueError: the policy is not known.
    """
    _require(eviction in COMPILED, f"{eviction} is not compiled")
    counts, n_keys = CallCounts.zeros(calls.trace.n_calls), calls.trace.n_keys
    held = None if pinned is None else np.ascontiguousarray(pinned, np.uint8)
    _require(held is None or len(held) == n_keys, "the pinned experts have another number")
    kernels.compiled().replay(
        calls.packed,
        COMPILED[eviction],
        _packed(parameters),
        capacity,
        per_layer,
        prefetch_depth,
        _address(held),
        *(_address(each) for each in (counts.hits, counts.prefetches, counts.prefetch_hits)),
    )
    return counts


def compiled_replay_two(
    calls: Calls,
    eviction: str,
    parameters: Sequence[int],
    answers: np.ndarray,
    given: np.ndarray,
    *,
    capacity: int,
    cheaper_capacity: int,
    per_layer: bool,
    counts: Sequence[np.ndarray],
) -> None:
    """Replay a trace through the caches of two forms; see `replay_two_caches`.

    Args:
        eviction: key of COMPILED.
        answers: [A] uint8: what answers if the primary form is not cached: 0 that form, 1 the
            cheaper one, 2 nothing.
        given: [A] uint8, filled with what did answer.
        capacity, cheaper_capacity: slots of each.
        counts: uses, misses, cheaper uses and cheaper misses, [C] uint16 each, which are filled.

    Raises:
        ValueError: the policy is not known, a cache has no slot, or an array does not fit.
    """
    _require(eviction in COMPILED, f"{eviction} is not compiled")
    least = calls.trace.n_layers if per_layer else 1
    _require(min(capacity, cheaper_capacity) >= least, "a cache has no slot")
    _require(len(answers) == len(calls.trace.keys), "the answers have another number")
    wanted = np.ascontiguousarray(answers, np.uint8)
    is_there = given.dtype == np.uint8 and given.flags.c_contiguous and len(given) == len(wanted)
    _require(is_there, "there is no room for what did answer")
    for each in counts:
        fits = each.dtype == np.uint16 and each.shape == (calls.trace.n_calls,)
        _require(fits and each.flags.c_contiguous, "the counts do not fit")
    kernels.compiled().replay_two(
        calls.packed,
        COMPILED[eviction],
        _packed(parameters),
        capacity,
        cheaper_capacity,
        per_layer,
        _address(wanted),
        _address(given),
        *map(_address, counts),
    )


def compiled_stack_depths(calls: Calls, next_use: np.ndarray | None) -> np.ndarray:
    """Return the smallest capacity at which each access hits, [A] int32; 0: none.

    Args:
        next_use: [A] int64, next call of the same expert, for Belady's policy; None: LRU.
    """
    n_accesses = len(calls.trace.keys)
    _require(next_use is None or len(next_use) == n_accesses, "the next uses do not fit")
    depths = np.zeros(n_accesses, np.int32)
    upcoming = None if next_use is None else np.ascontiguousarray(next_use, np.int64)
    kernels.compiled().stack_depths(calls.packed, _address(upcoming), _address(depths))
    return depths


def _packed(parameters: Sequence[int]) -> bytes:
    values = [*parameters, *([0] * (_N_PARAMETERS - len(parameters)))]
    return struct.pack(f"={_N_PARAMETERS}q", *values)


def _require(holds: bool, complaint: str) -> None:
    if not holds:
        raise ValueError(complaint)


def _require_ranges(trace: AccessTrace, start: np.ndarray, keys: np.ndarray) -> None:
    _require(len(start) == trace.n_calls + 1, "the calls have no beginnings")
    ends_right = int(start[0]) == 0 and int(start[-1]) == len(keys)
    _require(ends_right and bool((np.diff(start) >= 0).all()), "the calls' keys do not add up")
    _require(not len(keys) or _within(keys, trace.n_keys), "an expert does not exist")


def _within(values: np.ndarray, limit: int) -> bool:
    return 0 <= int(values.min()) <= int(values.max()) < limit


def _address(array: np.ndarray | None) -> int:
    return 0 if array is None else array.ctypes.data
