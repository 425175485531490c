"""Counts of a replay, call by call."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class CallCounts:
    """[C] uint16 each."""

    hits: np.ndarray
    """Experts that were in the cache when the call began, prefetched ones included"""
    prefetches: np.ndarray
    """Experts that were read ahead during the call"""
    prefetch_hits: np.ndarray
    """Hits that had been read ahead for this call"""

    @classmethod
    def zeros(cls, n_calls: int) -> "CallCounts":
        """Return counts of nothing."""
        return cls(
            hits=np.zeros(n_calls, np.uint16),
            prefetches=np.zeros(n_calls, np.uint16),
            prefetch_hits=np.zeros(n_calls, np.uint16),
        )
