"""Recency in two tiers, in which recent or predicted experts leave last: arXiv:2510.26730."""

from collections.abc import Collection, Sequence

import numpy as np

from moe_tool.policies.eviction.protocol import CacheShape
from moe_tool.policies.eviction.ranked import Ranked
from moe_tool.policies.eviction.spec import EvictionSpec
from moe_tool.policies.parameters import whole_number

_HIGH = 2**60


class Expertflow(Ranked):
    """The high tier holds experts used within the last `window` layer calls or predicted for one of
    the next; the low tier is evicted first, each tier in order of last use."""

    hints = frozenset({"predictions"})

    def __init__(self, shape: CacheShape, *, window: int = 2) -> None:
        super().__init__(shape)
        self._window = window
        self._call = 0
        self._uses = 0
        self._order = np.zeros(shape.n_keys, dtype=np.int64)
        self._high_until = np.full(shape.n_keys, -1, dtype=np.int64)  # number of a call

    def begin_call(self, layer: int) -> None:
        super().begin_call(layer)
        self._call += 1

    def touch(self, key: int) -> None:
        self._uses += 1
        self._order[key] = self._uses
        self._raise(key, self._call + self._window)
        self.rank(key, self._uses)

    add = touch

    def expect(self, keys: Sequence[int], *, ahead: int) -> None:
        if ahead <= self._window:
            for key in keys:
                self._raise(key, self._call + ahead)

    def evict(self, protected: Collection[int]) -> int:
        high = np.flatnonzero(self._high_until >= self._call).tolist()
        cached = [key for key in high if self.is_cached(key)]
        for key in cached:
            self.rank(key, _HIGH + int(self._order[key]))
        try:
            return super().evict(protected)
        finally:
            for key in cached:
                if self.is_cached(key):
                    self.rank(key, int(self._order[key]))

    def _raise(self, key: int, call: int) -> None:
        self._high_until[key] = max(self._high_until[key], call)


SPEC = EvictionSpec(
    name="expertflow",
    summary="those neither just used nor predicted soon",
    make=Expertflow,
    parameters={"window": whole_number("layer calls to look back and ahead", default=2)},
    source="arXiv:2510.26730",
    compiled="expertflow",
    look_ahead="window",
)
