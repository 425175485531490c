"""Signature of a prefetch policy."""

from typing import Protocol

import numpy as np


class ChoosePrefetch(Protocol):
    """A pure function: the same prediction and residency give the same choice."""

    def __call__(self, index: np.ndarray, weight: np.ndarray, resident: np.ndarray) -> list[int]:
        """Return the experts of the next MoE layer to read, the most wanted first.

        Args:
            index: [T, K] int64: the experts that the layer is predicted to want; below 0 or from E
                on, no expert.
            weight: [T, K]: their predicted gate weights.
            resident: [E] bool: what is in memory, or on its way there.
        """
