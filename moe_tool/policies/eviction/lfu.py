"""Evict the least used expert, with counts that decay."""

import numpy as np

from moe_tool.policies.eviction.protocol import CacheShape
from moe_tool.policies.eviction.ranked import Ranked
from moe_tool.policies.eviction.spec import EvictionSpec
from moe_tool.policies.parameters import whole_number

USES_BITS = 40
MAX_COUNT = 2**20


class Lfu(Ranked):
    """Uses of every expert, cached or not, halved periodically; ties are broken by last use."""

    def __init__(self, shape: CacheShape, *, halve_every: int = 64) -> None:
        super().__init__(shape)
        self._halve_every = halve_every
        self._counts = np.zeros(shape.n_keys, dtype=np.int64)
        self._last_use = np.zeros(shape.n_keys, dtype=np.int64)
        self._uses = 0

    def begin_call(self, layer: int) -> None:
        before = self.forward
        super().begin_call(layer)
        if self.forward != before and self.forward % self._halve_every == 0:
            self._counts >>= 1
            for key in range(self.shape.n_keys):
                if self.is_cached(key):
                    self._rank(key)

    def touch(self, key: int) -> None:
        self._uses += 1
        self._counts[key] = min(self._counts[key] + 1, MAX_COUNT)
        self._last_use[key] = self._uses
        self._rank(key)

    add = touch

    def _rank(self, key: int) -> None:
        self.rank(key, (int(self._counts[key]) << USES_BITS) + int(self._last_use[key]))


HALVE_EVERY = whole_number("forwards after which all counts are halved", default=64)
SPEC = EvictionSpec(
    name="lfu",
    summary="the least used, old uses counting half",
    make=Lfu,
    parameters={"halve-every": HALVE_EVERY},
    compiled="lfu",
)
