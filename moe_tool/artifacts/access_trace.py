"""Access trace: the experts that layers of a model called, in order; and counts of its replay."""

from dataclasses import dataclass, fields

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessTrace:
    """C layer calls with A expert accesses.

    A key is an expert's number plus E times its layer's position among the L MoE layers.
    """

    n_layers: int
    n_experts: int
    layer: np.ndarray
    """[C] int32: position of the layer among the MoE layers"""
    start: np.ndarray
    """[C + 1] int64: index in `keys` at which each call begins"""
    keys: np.ndarray
    """[A] int32 keys, ascending and distinct within a call"""
    forward: np.ndarray
    """[C] int32: number of the forward that a call belongs to"""
    scores: np.ndarray | None = None
    """[C, E] uint16: `gate_scores` of each call; None: not recorded"""
    guess_start: np.ndarray | None = None
    """[C + 1] int64: index in `guesses` at which each call begins"""
    guesses: np.ndarray | None = None
    """int32 keys that the next layers' routers choose on this layer's input, nearest layer first"""
    begins: np.ndarray | None = None
    """[C] bool: whether a sequence begins with the call; None: all is one sequence"""

    @property
    def n_calls(self) -> int:
        """C: number of layer calls."""
        return len(self.layer)

    @property
    def n_keys(self) -> int:
        """Number of experts in all layers."""
        return self.n_layers * self.n_experts

    @property
    def sizes(self) -> np.ndarray:
        """[C] int64: number of experts of each call."""
        return np.diff(self.start)

    @property
    def n_forwards(self) -> int:
        return int(self.forward[-1]) + 1 if len(self.forward) else 0

    @property
    def cycle(self) -> float:
        """Mean number of experts that a forward calls in all layers."""
        return len(self.keys) / self.n_forwards if self.n_forwards else 0.0

    def calls(self) -> list[list[int]]:
        """Return the keys of every call."""
        return [part.tolist() for part in np.split(self.keys, self.start[1:-1])]


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
        return cls(**{field.name: np.zeros(n_calls, np.uint16) for field in fields(cls)})
