"""Least recently used within two classes of experts: used once, and used again (segmented LRU).

R. Karedla, J. S. Love, B. G. Wherry, Caching strategies to improve disk system performance, IEEE
Computer 27(3), 1994.
"""

from collections.abc import Collection

from moe_tool.policies.eviction.protocol import CacheShape, Eviction
from moe_tool.policies.eviction.spec import EvictionSpec
from moe_tool.policies.parameters import whole_number


class ClassLru(Eviction):
    """A new expert is on probation; a use while it is cached makes it protected.

    If the protected class overflows, its least recently used expert goes back on probation as the
    most recently used. The least recently used on probation leaves first.
    """

    def __init__(self, shape: CacheShape, *, protected: int = 80) -> None:
        self._n_protected = shape.capacity * protected // 100
        self._probation: dict[int, None] = {}  # both dicts: least recently used first
        self._protected: dict[int, None] = {}

    def touch(self, key: int) -> None:
        self.discard(key)
        self._protected[key] = None
        if len(self._protected) > self._n_protected:
            oldest = next(iter(self._protected))
            del self._protected[oldest]
            self._probation[oldest] = None

    def add(self, key: int) -> None:
        self._probation[key] = None

    def evict(self, protected: Collection[int]) -> int:
        for segment in (self._probation, self._protected):
            for key in segment:
                if key not in protected:
                    del segment[key]
                    return key
        raise LookupError("every cached expert is protected")

    def discard(self, key: int) -> None:
        self._probation.pop(key, None)
        self._protected.pop(key, None)


SPEC = EvictionSpec(
    name="class-lru",
    summary="the least recently used among those used once, then among those used again while "
    "cached",
    make=ClassLru,
    parameters={
        "protected": whole_number(
            "most of the cache that experts used again may hold, percent",
            default=80,
            most=100,
            least=0,
        )
    },
    source="segmented LRU, Karedla et al. 1994",
)
