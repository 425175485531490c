"""A weighted mix of recency, frequency and layer distance: arXiv:2411.01433, section 4.3."""

import numpy as np

from moe_tool.policies.eviction.protocol import CacheShape
from moe_tool.policies.eviction.ranked import Ranked
from moe_tool.policies.eviction.spec import EvictionSpec
from moe_tool.policies.parameters import Parameter, whole_number


class Hobbit(Ranked):
    """Evict the least priority w_lru R/T + w_lfu F/T + w_lhu H/T + w_fld (1 - d/L).

    R is the token of an expert's last use, F the number of its uses, H that of its uses in the
    primary form, T the current token, L the number of layers. R and F are of every form: a cache of
    one form also hears of the uses of the other, so that the caches of both go by the same records.
    d counts the layer calls
    until the expert's layer is called again; the printed formula counts those since its last call,
    which evicts first what is wanted next (docs/simulate.md has both). Priorities are scaled by T L
    to integers. Counts are kept from one sequence to the next.
    """

    hints = frozenset({"other forms"})

    def __init__(
        self, shape: CacheShape, *, lru: int = 25, lfu: int = 25, lhu: int = 25, fld: int = 25
    ) -> None:
        super().__init__(shape)
        self._of_last, self._of_uses, self._of_precise, self._of_distance = lru, lfu, lhu, fld
        self._uses = np.zeros(shape.n_keys, dtype=np.int64)
        self._precise = np.zeros(shape.n_keys, dtype=np.int64)

    def touch(self, key: int) -> None:
        self._record(key, is_precise=not self.shape.is_cheaper)

    add = touch

    def hear(self, key: int) -> None:
        is_cached = self.is_cached(key)
        self._record(key, is_precise=self.shape.is_cheaper)
        if not is_cached:
            self.discard(key)

    def _record(self, key: int, *, is_precise: bool) -> None:
        self._uses[key] += 1
        self._precise[key] += is_precise
        mixed = self._of_last * self.forward + self._of_uses * int(self._uses[key])
        mixed += self._of_precise * int(self._precise[key])
        self.rank(key, self.shape.n_layers * mixed)

    def begin_call(self, layer: int) -> None:
        super().begin_call(layer)
        nearness = self.shape.n_layers - self.turns_until() + 1
        self.layer_ranks = self.forward * self._of_distance * nearness


def _weight(of: str) -> Parameter:
    return whole_number(f"weight of {of}, percent", default=25, least=0)


SPEC = EvictionSpec(
    name="hobbit",
    summary="the least of recency, uses and nearness of the layer's turn, weighted",
    make=Hobbit,
    parameters={
        "lru": _weight("recency"),
        "lfu": _weight("uses"),
        "lhu": _weight("uses at high precision"),
        "fld": _weight("nearness of the layer's turn"),
    },
    source="arXiv:2411.01433",
    compiled="hobbit",
)
