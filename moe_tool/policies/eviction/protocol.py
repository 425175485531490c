"""Methods that a cache of experts calls on its eviction policy."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

Hint = Literal["scores", "predictions", "other forms"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    """Size of a cache and of the model. An expert's key is its layer's position among the MoE
    layers times `n_experts`, plus its id."""

    n_layers: int
    """MoE layers"""
    n_experts: int
    """Experts of one layer"""
    capacity: int
    """Most experts in the cache, pinned ones not counted"""
    is_cheaper: bool = False
    """Whether the cache holds a cheaper form of the experts"""

    @property
    def n_keys(self) -> int:
        """Number of experts of all layers."""
        return self.n_layers * self.n_experts


class Eviction:
    """Base of eviction policies: the order in which cached experts are evicted.

    The policy is told of calls, entries and departures, except for pinned experts; it overrides the
    methods that matter to it. It is deterministic: no clock, no random numbers, integers only.
    """

    hints: ClassVar[frozenset[Hint]] = frozenset()
    """Hints that it needs beside the accesses"""

    def __init__(self, shape: CacheShape, **parameters: int) -> None:
        """Begin with an empty cache."""

    def begin_sequence(self) -> None:
        """Begin a new sequence, or batch of sequences, before its first call."""

    def begin_call(self, layer: int) -> None:
        """Begin the call of a layer, given by position; a forward calls layers ascending."""

    def touch(self, key: int) -> None:
        """Record a use of a cached expert."""

    def add(self, key: int) -> None:
        """Record an expert that enters the cache; it counts as used."""

    def evict(self, protected: Collection[int]) -> int:
        """Remove and return the first cached expert to evict that is not in `protected`.

        Raises:
            LookupError: every cached expert is protected.
        """
        raise NotImplementedError

    def discard(self, key: int) -> None:
        """Record that a cached expert left for another reason."""

    def observe(self, layer: int, scores: np.ndarray) -> None:
        """Record a call's router scores, [E] integers of `gate_scores`, before its accesses; called
        if `hints` has "scores"."""

    def hear(self, key: int) -> None:
        """Record an expert that another form answers in the current call, before its accesses; it
        need not be cached here. Called if `hints` has "other forms"."""

    def expect(self, keys: Sequence[int], *, ahead: int) -> None:
        """Record one layer's experts predicted for a coming call, after the accesses of the current
        call; `ahead` is 1 for the next layer call. Called if `hints` has "predictions"."""
