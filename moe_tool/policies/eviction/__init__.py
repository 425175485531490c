"""Which expert leaves the cache when another one needs its slot."""

from collections.abc import Callable

from moe_tool.policies.eviction.lru import Lru
from moe_tool.policies.eviction.protocol import Eviction, ExpertKey

EVICTION: dict[str, Callable[[], Eviction]] = {"lru": Lru}
"""Every eviction policy by the name that `--eviction` takes."""

__all__ = ["EVICTION", "Eviction", "ExpertKey", "Lru"]
