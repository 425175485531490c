"""Compiled replay of layer calls through an expert cache, on checked arrays."""

import struct
from collections.abc import Sequence

import numpy as np

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
_N_PARAMETERS = 4


class Calls:
    """Layer calls described for the compiled replay; keeps the arrays alive."""

    def __init__(
        self,
        *,
        n_layers: int,
        n_experts: int,
        layer: np.ndarray,
        start: np.ndarray,
        keys: np.ndarray,
        scores: np.ndarray | None = None,
        guess_start: np.ndarray | None = None,
        guesses: np.ndarray | None = None,
    ) -> None:
        """Check the arrays of an `AccessTrace` and describe them.

        Raises:
            ValueError: they do not fit together.
        """
        self.n_calls, self.n_keys = len(layer), n_layers * n_experts
        _require(n_layers > 0 and n_experts > 0, "there are no experts")
        _require(not self.n_calls or _within(layer, n_layers), "a layer does not exist")
        _require_ranges(start, keys, self.n_calls, self.n_keys)
        if guess_start is not None and guesses is not None:
            _require_ranges(guess_start, guesses, self.n_calls, self.n_keys)
            owner = np.repeat(layer, np.diff(guess_start))
            _require(bool((guesses // n_experts > owner).all()), "a guess is not about a layer on")
        if scores is not None:
            _require(scores.shape == (self.n_calls, n_experts), "the scores have another shape")
        self._arrays = [
            None if array is None else np.ascontiguousarray(array, dtype=dtype)
            for array, dtype in (
                (layer, np.int32),
                (start, np.int64),
                (keys, np.int32),
                (scores, np.uint16),
                (guess_start, np.int64),
                (guesses, np.int32),
            )
        ]
        self.n_accesses = len(keys)
        addresses = [_address(array) for array in self._arrays]
        self.packed = struct.pack("=q2i6Q", self.n_calls, n_layers, n_experts, *addresses)


def compiled_replay(
    calls: Calls,
    eviction: str,
    parameters: Sequence[int],
    *,
    capacity: int,
    per_layer: bool,
    pinned: np.ndarray | None,
    prefetch_depth: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return hits, prefetches and prefetch hits of every call, [C] uint16 each.

    Args:
        eviction: key of COMPILED.
        parameters: the policy's parameters, in its order.
        capacity: cached experts, pinned ones not counted.
        pinned: [L * E] bool, experts that are never evicted.

    Raises:
        ValueError: the policy is not known.
    """
    _require(eviction in COMPILED, f"{eviction} is not compiled")
    values = [*parameters, *([0] * (_N_PARAMETERS - len(parameters)))]
    counts = [np.zeros(calls.n_calls, np.uint16) for _ in range(3)]
    held = None if pinned is None else np.ascontiguousarray(pinned, np.uint8)
    _require(held is None or len(held) == calls.n_keys, "the pinned experts have another number")
    kernels.compiled().replay(
        calls.packed,
        COMPILED[eviction],
        struct.pack(f"={_N_PARAMETERS}q", *values),
        capacity,
        per_layer,
        prefetch_depth,
        _address(held),
        *(_address(array) for array in counts),
    )
    return counts[0], counts[1], counts[2]


def compiled_stack_depths(calls: Calls, next_use: np.ndarray | None) -> np.ndarray:
    """Return the smallest capacity at which each access hits, [A] int32; 0: none.

    Args:
        next_use: [A] int64, next call of the same expert, for Belady's policy; None: LRU.
    """
    _require(next_use is None or len(next_use) == calls.n_accesses, "the next uses do not fit")
    depths = np.zeros(calls.n_accesses, np.int32)
    upcoming = None if next_use is None else np.ascontiguousarray(next_use, np.int64)
    kernels.compiled().stack_depths(calls.packed, _address(upcoming), _address(depths))
    return depths


def _require(holds: bool, complaint: str) -> None:
    if not holds:
        raise ValueError(complaint)


def _require_ranges(start: np.ndarray, keys: np.ndarray, n_calls: int, n_keys: int) -> None:
    _require(len(start) == n_calls + 1, "the calls have no beginnings")
    ends_right = int(start[0]) == 0 and int(start[-1]) == len(keys)
    _require(ends_right and bool((np.diff(start) >= 0).all()), "the calls' keys do not add up")
    _require(not len(keys) or _within(keys, n_keys), "an expert does not exist")


def _within(values: np.ndarray, limit: int) -> bool:
    return 0 <= int(values.min()) <= int(values.max()) < limit


def _address(array: np.ndarray | None) -> int:
    return 0 if array is None else array.ctypes.data
