"""Content of an expert cache, call by call, for the store and the simulator."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from moe_tool.policies.eviction.protocol import CacheShape, Eviction

MakeEviction = Callable[[CacheShape], Eviction]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One expert that enters the cache."""

    key: int
    victim: int | None
    """Expert that leaves for it; None: there was room"""


class ExpertCache:
    """Ids of the experts in a cache.

    A layer call names its experts at once. Those in the cache when it begins are its hits. Then, in
    the order in which they are named, hits are used and the others enter, each for the policy's
    victim if there is no room; an expert of the call is a victim only if nothing else is cached.
    """

    def __init__(
        self,
        make: MakeEviction,
        *,
        n_layers: int,
        n_experts: int,
        capacity: int,
        per_layer: bool = False,
        pinned: Collection[int] = (),
    ) -> None:
        """Begin with the pinned experts only.

        Args:
            make: factory of the policy.
            n_layers, n_experts: as in `CacheShape`, which defines the keys.
            capacity: most experts in the cache, pinned ones not counted; 0 only if all are pinned,
                and at least `n_layers` with `per_layer`.
            per_layer: every layer has its own equal part of the capacity, and its own policy.
            pinned: experts that are always cached.
        """
        self.n_experts = n_experts
        self._pinned = frozenset(pinned)
        self._cached: set[int] = set()
        n_parts = n_layers if per_layer else 1
        rooms = [capacity // n_parts + (part < capacity % n_parts) for part in range(n_parts)]
        self._room = rooms
        self._policies = [
            make(CacheShape(n_layers=n_layers, n_experts=n_experts, capacity=room))
            for room in rooms
        ]
        self._per_layer = per_layer
        self.hints = self._policies[0].hints
        """Hints that the policy needs beside the accesses"""

    def __contains__(self, key: int) -> bool:
        return key in self._cached or key in self._pinned

    def begin_sequence(self) -> None:
        """Begin a new sequence, or batch of sequences, before its first call."""
        for policy in self._policies:
            policy.begin_sequence()

    def begin_call(
        self, layer: int, scores: np.ndarray | None = None, *, elsewhere: Sequence[int] = ()
    ) -> None:
        """Begin the call of a layer, given by position, before its accesses; `scores` [E] are
        needed if `hints` has "scores", and `elsewhere`, the experts that another form answers in
        this call, if it has "other forms"."""
        policy = self._policies[layer if self._per_layer else 0]
        policy.begin_call(layer)
        if scores is not None and "scores" in policy.hints:
            policy.observe(layer, scores)
        if "other forms" in policy.hints:
            for key in elsewhere:
                policy.hear(key)

    def access(self, keys: Sequence[int]) -> list[Entry]:
        """Use the distinct experts of a call and return those that were missing."""
        entries = []
        named = set(keys)
        hits = named & self._cached
        for key in keys:
            if key in hits:
                if key in self._cached:  # or an expert of the same call took its place
                    self._policy(key).touch(key)
            elif key not in self._pinned:
                try:
                    entries.append(self._enter(key, named))
                except LookupError:
                    entries.append(self._enter(key, ()))
        return entries

    def prefetch(self, keys: Sequence[int], held: Collection[int]) -> list[Entry]:
        """Let prefetched experts enter, as long as others than `held` can leave."""
        entries = []
        for key in keys:
            try:
                entries.append(self._enter(key, held))
            except LookupError:
                break
        return entries

    def expect(self, keys: Sequence[int], *, ahead: int) -> None:
        """Tell the policy one layer's experts predicted for the call `ahead` calls from now."""
        if keys and "predictions" in self.hints:
            self._policy(keys[0]).expect(keys, ahead=1 if self._per_layer else ahead)

    def discard(self, key: int) -> None:
        """Remove a cached expert."""
        self._room[self._part(key)] += 1
        self._policy(key).discard(key)
        self._cached.discard(key)

    def _enter(self, key: int, held: Collection[int]) -> Entry:
        """Let an expert enter; LookupError: no other one than `held` can leave."""
        part, victim = self._part(key), None
        if self._room[part] > 0:
            self._room[part] -= 1
        else:
            victim = self._policies[part].evict(held)
            self._cached.discard(victim)
        self._policies[part].add(key)
        self._cached.add(key)
        return Entry(key=key, victim=victim)

    def _part(self, key: int) -> int:
        return key // self.n_experts if self._per_layer else 0

    def _policy(self, key: int) -> Eviction:
        return self._policies[self._part(key)]
