"""Counts of a replay, call by call."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class CallCounts:
    """Hits and prefetches of C layer calls, [C] uint16 each."""

    hits: np.ndarray
    """Experts in the cache when the call began, prefetched ones included"""
    prefetches: np.ndarray
    """Experts whose prefetch began during the call"""
    prefetch_hits: np.ndarray
    """Hits on experts that had been prefetched for this call"""

    @classmethod
    def zeros(cls, n_calls: int) -> "CallCounts":
        """Return counts that are all zero."""
        return cls(
            hits=np.zeros(n_calls, np.uint16),
            prefetches=np.zeros(n_calls, np.uint16),
            prefetch_hits=np.zeros(n_calls, np.uint16),
        )
