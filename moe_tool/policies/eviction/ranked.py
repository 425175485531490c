"""Base of policies that evict experts in the order of an integer rank."""

from collections.abc import Collection

import numpy as np

from moe_tool.policies.eviction.protocol import CacheShape, Eviction

_ABSENT = 2**62


class Ranked(Eviction):
    """Evicts the lowest rank first, then the lowest key. A layer's rank is added to those of its
    experts."""

    def __init__(self, shape: CacheShape) -> None:
        self.shape = shape
        self.layer = shape.n_layers
        """Position of the current layer"""
        self.forward = 0
        """Number of the current forward, from 1"""
        self._ranks = np.full((shape.n_layers, shape.n_experts), _ABSENT, dtype=np.int64)
        self._flat = self._ranks.reshape(-1)
        self.layer_ranks: np.ndarray | None = None
        """[L] int64: rank added to those of a layer's experts"""

    def begin_call(self, layer: int) -> None:
        """Count forwards: each calls layers in ascending order."""
        if layer <= self.layer:
            self.forward += 1
        self.layer = layer

    def rank(self, key: int, rank: int) -> None:
        """Set the rank of an expert, which is cached from now on."""
        self._flat[key] = rank

    def rank_layer(self, layer: int, ranks: np.ndarray) -> None:
        """Set the ranks [E] int64 of a layer's cached experts; others are ignored."""
        row = self._ranks[layer]
        np.copyto(row, ranks, where=row != _ABSENT)

    def is_cached(self, key: int) -> bool:
        """Return whether an expert has a rank."""
        return bool(self._flat[key] != _ABSENT)

    def evict(self, protected: Collection[int]) -> int:
        held = [(key, self._flat[key]) for key in protected]
        for key, _ in held:
            self._flat[key] = _ABSENT
        ranks = self._ranks
        if self.layer_ranks is not None:
            ranks = ranks + self.layer_ranks[:, None]
        victim = int(np.argmin(ranks))
        is_cached = self.is_cached(victim)
        for key, rank in held:
            self._flat[key] = rank
        if not is_cached:
            raise LookupError("every cached expert is protected")
        self._flat[victim] = _ABSENT
        return victim

    def discard(self, key: int) -> None:
        self._flat[key] = _ABSENT

    def turns_until(self) -> np.ndarray:
        """Return the number of layer calls until each layer is called, [L] int64 of 1..L; L for the
        current layer."""
        n_layers = self.shape.n_layers
        return (np.arange(n_layers) - self.layer - 1) % n_layers + 1
