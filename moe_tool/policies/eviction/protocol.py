"""Methods that a cache of experts calls on its eviction policy."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np

Hint = Literal["scores", "predictions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    """The experts that a policy chooses from. An expert's key is its layer's position among the MoE
    layers times `n_experts`, plus its number."""

    n_layers: int
    """MoE layers"""
    n_experts: int
    """Experts of one layer"""
    capacity: int
    """Experts in the cache at most, pinned ones not counted"""

    @property
    def n_keys(self) -> int:
        """Number of experts in all."""
        return self.n_layers * self.n_experts


class Eviction(Protocol):
    """Keeps the order in which cached experts are given up.

    The policy is told what is called, enters and leaves; pinned experts are never named to it. The
    same notes give the same victims: no clock, no random numbers, nothing but integers.
    """

    hints: ClassVar[frozenset[Hint]]
    """Notes that it wants beside the accesses"""

    def begin_call(self, layer: int) -> None:
        """Take note that a layer is called, by its position; forwards go through them ascending."""

    def touch(self, key: int) -> None:
        """Take note of a use of a cached expert."""

    def add(self, key: int) -> None:
        """Take note of an expert that enters the cache; it counts as used."""

    def evict(self, protected: Collection[int]) -> int:
        """Return the cached expert to give up first, none of `protected`, and forget it.

        Raises:
            LookupError: every cached expert is protected.
        """

    def discard(self, key: int) -> None:
        """Take note of a cached expert that left for another reason."""

    def observe(self, layer: int, scores: np.ndarray) -> None:
        """Take note of what a layer's router says of all its experts, before the call's accesses.

        Args:
            layer: its position.
            scores: [E] integers, `gate_scores`; told where `hints` has "scores".
        """

    def expect(self, keys: Sequence[int], *, ahead: int) -> None:
        """Take note of the experts that a call to come is predicted to name, after the accesses of
        the call under way; told where `hints` has "predictions".

        Args:
            keys: of one layer.
            ahead: 1 for the next layer call.
        """
