"""Evict the least recently used expert."""

from dataclasses import replace

from moe_tool.policies.eviction.ranked import Ranked
from moe_tool.policies.eviction.spec import EvictionSpec


class Lru(Ranked):
    """Recency order over the experts of all layers."""

    _uses = 0

    def touch(self, key: int) -> None:
        self._uses += 1
        self.rank(key, self._uses)

    add = touch


SPEC = EvictionSpec(name="lru", summary="the least recently used", make=Lru, compiled="lru")
STATIC_HOT = replace(
    SPEC,
    name="static-hot",
    summary="none of the profile's hottest experts: only the slots of one token change",
    pinned_share=1.0,
)
PINNED = replace(
    SPEC,
    name="pinned+lru",
    summary="as lru, beside the hottest experts in half of the slots",
    pinned_share=0.5,
)
