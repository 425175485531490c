"""Which experts the layers of a model called, in the order of the calls."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessTrace:
    """C layer calls with A accesses in all. A key is a layer's position among the L MoE layers
    times E, plus the expert's number."""

    n_layers: int
    n_experts: int
    layer: np.ndarray
    """[C] int32: position of the layer"""
    start: np.ndarray
    """[C + 1] int64: where the call's keys begin"""
    keys: np.ndarray
    """[A] int32: distinct within a call, ascending"""
    forward: np.ndarray
    """[C] int32: running number of the forward that a call belongs to"""
    scores: np.ndarray | None = None
    """[C, E] uint16: `gate_scores` of the call"""
    guess_start: np.ndarray | None = None
    """[C + 1] int64: where the call's guesses begin"""
    guesses: np.ndarray | None = None
    """int32: keys that the next layers' routers name when they see this layer's input, the next
    layer's first"""

    @property
    def n_calls(self) -> int:
        """C"""
        return len(self.layer)

    @property
    def n_keys(self) -> int:
        """Experts of all layers."""
        return self.n_layers * self.n_experts

    @property
    def sizes(self) -> np.ndarray:
        """[C] int64: experts of each call."""
        return np.diff(self.start)

    @property
    def n_forwards(self) -> int:
        """Forwards in all."""
        return int(self.forward[-1]) + 1 if len(self.forward) else 0

    @property
    def cycle(self) -> float:
        """Experts that one forward calls, all layers together, on average."""
        return len(self.keys) / self.n_forwards if self.n_forwards else 0.0

    def calls(self) -> list[list[int]]:
        """Return the keys of every call."""
        return [part.tolist() for part in np.split(self.keys, self.start[1:-1])]
