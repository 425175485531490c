"""Expert cache with prefetches that the next call of their layer settles, as a store has it."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from moe_tool.policies.eviction import ExpertCache, MakeEviction
from moe_tool.policies.eviction.expert_cache import Entry


@dataclass(frozen=True, slots=True, kw_only=True)
class Used:
    """Counts of one layer call."""

    misses: int
    prefetch_hits: int


class PrefetchingCache:
    """Content of a cache, call by call, with the experts prefetched for coming calls."""

    def __init__(
        self,
        make: MakeEviction,
        *,
        n_layers: int,
        n_experts: int,
        capacity: int,
        per_layer: bool = False,
    ) -> None:
        """Begin empty; arguments as of `ExpertCache`."""
        self.n_experts = n_experts
        self._cache = ExpertCache(
            make, n_layers=n_layers, n_experts=n_experts, capacity=capacity, per_layer=per_layer
        )
        self._pending: dict[int, list[int]] = {}
        """Layer -> keys prefetched for its next call"""
        self._held: set[int] = set()
        """Keys that no prefetch of the current call may evict"""

    def __contains__(self, key: int) -> bool:
        return key in self._cache

    def begin_sequence(self) -> None:
        """Begin a new sequence before its first call."""
        self._cache.begin_sequence()

    def use(
        self,
        layer: int,
        scores: np.ndarray | None,
        keys: Sequence[int],
        elsewhere: Sequence[int],
    ) -> Used:
        """Make a layer's call; prefetches for it that it does not name leave.

        Args:
            elsewhere: keys of the call that another form answers.
        """
        expected = self._pending.pop(layer, [])
        for key in expected:
            if key not in keys:
                self._cache.discard(key)
        self._cache.begin_call(layer, scores, elsewhere=elsewhere)
        entries = self._cache.access(keys)
        self._leave(entries)
        self._held = set(keys)
        n_expected = sum(key in keys for key in expected)
        return Used(misses=len(entries), prefetch_hits=n_expected)

    def prefetch(self, keys: Sequence[int], *, spare: Collection[int]) -> int:
        """Let missing keys of one layer enter, most wanted first, as long as others than the call's
        and those to spare can leave; return how many did."""
        self._held |= {*keys, *spare}
        entries = self._cache.prefetch(keys, self._held)
        for entry in entries:
            self._pending.setdefault(entry.key // self.n_experts, []).append(entry.key)
        self._leave(entries)
        return len(entries)

    def _leave(self, entries: Sequence[Entry]) -> None:
        """Forget prefetches that were evicted before their layer's call."""
        for entry in entries:
            if entry.victim is not None:
                pending = self._pending.get(entry.victim // self.n_experts, [])
                if entry.victim in pending:
                    pending.remove(entry.victim)
