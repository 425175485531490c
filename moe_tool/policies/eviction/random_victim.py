"""Evict any expert, drawn by a hash: the control that other policies have to beat."""

from collections.abc import Collection

from moe_tool.policies.eviction.protocol import CacheShape, Eviction
from moe_tool.policies.eviction.spec import EvictionSpec
from moe_tool.policies.parameters import whole_number

_MASK = 2**64 - 1


class RandomVictim(Eviction):
    """Draw each victim evenly from the cached experts that may leave; the same seed and accesses
    give the same victims."""

    def __init__(self, shape: CacheShape, *, seed: int = 0) -> None:
        self._cached: set[int] = set()
        self._state = seed

    def add(self, key: int) -> None:
        self._cached.add(key)

    def evict(self, protected: Collection[int]) -> int:
        candidates = sorted(self._cached.difference(protected))
        if not candidates:
            raise LookupError("every cached expert is protected")
        victim = candidates[self._draw() % len(candidates)]
        self._cached.remove(victim)
        return victim

    def discard(self, key: int) -> None:
        self._cached.discard(key)

    def _draw(self) -> int:
        """Return 64 random bits: the generator splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK
        mixed = self._state
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
        return mixed ^ (mixed >> 31)


SPEC = EvictionSpec(
    name="random",
    summary="any, each with the same probability: a control",
    make=RandomVictim,
    parameters={"seed": whole_number("seed of the draws", default=0, least=0)},
)
