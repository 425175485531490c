"""Least frequently used, where an evicted expert that comes back keeps half of its count."""

from collections.abc import Collection

from moe_tool.policies.eviction.lfu import HALVE_EVERY, MAX_COUNT, USES_BITS
from moe_tool.policies.eviction.protocol import CacheShape
from moe_tool.policies.eviction.ranked import Ranked
from moe_tool.policies.eviction.spec import EvictionSpec
from moe_tool.policies.parameters import whole_number


class LfuGhost(Ranked):
    """Uses since an expert entered the cache, plus half of its count at its last eviction.

    Only the last `ghosts` evicted experts are remembered; others begin at zero, so that counts
    reflect recent use. All counts are halved periodically. Ties are broken by last use.
    """

    def __init__(self, shape: CacheShape, *, ghosts: int = 100, halve_every: int = 64) -> None:
        super().__init__(shape)
        self._n_ghosts = shape.capacity * ghosts // 100
        self._halve_every = halve_every
        self._counts: dict[int, int] = {}
        self._last_use: dict[int, int] = {}
        self._ghosts: dict[int, int] = {}  # key -> halved count, in order of eviction
        self._uses = 0

    def begin_call(self, layer: int) -> None:
        before = self.forward
        super().begin_call(layer)
        if self.forward != before and self.forward % self._halve_every == 0:
            self._counts = {key: count >> 1 for key, count in self._counts.items()}
            self._ghosts = {key: count >> 1 for key, count in self._ghosts.items() if count > 1}
            for key in self._counts:
                self._rank(key)

    def touch(self, key: int) -> None:
        self._uses += 1
        self._counts[key] = min(self._counts[key] + 1, MAX_COUNT)
        self._last_use[key] = self._uses
        self._rank(key)

    def add(self, key: int) -> None:
        self._counts[key] = self._ghosts.pop(key, 0)
        self.touch(key)

    def evict(self, protected: Collection[int]) -> int:
        victim = super().evict(protected)
        self._remember(victim, self._counts.pop(victim) >> 1)
        return victim

    def discard(self, key: int) -> None:
        """See `Eviction`. The expert gets back its earlier count, since it was not used."""
        super().discard(key)
        self._remember(key, self._counts.pop(key) - 1)

    def _remember(self, key: int, count: int) -> None:
        if count > 0:
            self._ghosts[key] = count
        if len(self._ghosts) > self._n_ghosts:
            del self._ghosts[next(iter(self._ghosts))]

    def _rank(self, key: int) -> None:
        self.rank(key, (self._counts[key] << USES_BITS) + self._last_use[key])


SPEC = EvictionSpec(
    name="lfu-ghost",
    summary="the least used since they entered, plus half of the count at their last eviction",
    make=LfuGhost,
    parameters={
        "ghosts": whole_number(
            "evicted experts to remember, percent of the cache's slots",
            default=100,
            most=10**4,
            least=0,
        ),
        "halve-every": HALVE_EVERY,
    },
)
