"""Evict the least recently used expert."""

from moe_tool.policies.eviction.ranked import Ranked
from moe_tool.policies.eviction.spec import EvictionSpec


class Lru(Ranked):
    """Recency order over the experts of all layers."""

    _uses = 0

    def touch(self, key: int) -> None:
        self._uses += 1
        self.rank(key, self._uses)

    add = touch


SPEC = EvictionSpec(
    name="lru",
    summary="the least recently used",
    make=Lru,
    compiled="lru",
    is_stack=True,
)
