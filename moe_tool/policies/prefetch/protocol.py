"""Signature of a prefetch policy."""

from typing import Protocol

import numpy as np


class ChoosePrefetch(Protocol):
    """Pure function that chooses the experts to prefetch."""

    def __call__(self, index: np.ndarray, weight: np.ndarray, resident: np.ndarray) -> list[int]:
        """Return the experts of the next MoE layer to read, the most wanted first.

        Args:
            index: [T, K] int64: predicted experts; ids outside 0..E-1 mean no expert.
            weight: [T, K] predicted gate weights.
            resident: [E] bool: experts in memory or being read.
        """
