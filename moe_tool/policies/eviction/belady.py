"""Evict the expert whose next use lies farthest ahead: the bound, which needs the future.

L. A. Belady, A study of replacement algorithms for a virtual-storage computer, 1966.
"""

from collections.abc import Collection, Sequence

from moe_tool.policies.eviction.protocol import CacheShape
from moe_tool.policies.eviction.ranked import Ranked


class Belady(Ranked):
    """Belady's policy: the fewest misses without prefetch, pins and records of several sizes."""

    def __init__(self, shape: CacheShape, *, calls: Sequence[Collection[int]]) -> None:
        """Begin with an empty cache, given the keys of every coming layer call in order."""
        super().__init__(shape)
        n_calls = len(calls)
        self._call = -1
        self._next_use: list[dict[int, int]] = [{} for _ in calls]
        upcoming: dict[int, int] = {}
        for number in range(n_calls - 1, -1, -1):
            for key in calls[number]:
                # The lower of two keys that are never used again leaves first.
                self._next_use[number][key] = upcoming.get(key, n_calls)
                upcoming[key] = number

    def begin_call(self, layer: int) -> None:
        super().begin_call(layer)
        self._call += 1

    def touch(self, key: int) -> None:
        self.rank(key, -self._next_use[self._call][key])

    add = touch
