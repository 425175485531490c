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
    d counts the layer calls until the expert's layer is called again, and with `fld_printed` those
    since its last call, as the formula is printed, which evicts first what is wanted next
    (docs/simulate.md has both). Priorities are scaled by T L to integers.

    With `reset`, R, F, H and T begin anew with every sequence, as in the paper; what is cached
    stays. Two options are not the paper's: with `halve_every`, F, H and T are halved periodically;
    with `own`, H are the uses in the cache's own form, so that the cache of the cheaper form keeps
    what is used there. With both and nearly all weight on H it is `lfu`.
    """

    hints = frozenset({"other forms"})

    def __init__(
        self,
        shape: CacheShape,
        *,
        lru: int = 25,
        lfu: int = 25,
        lhu: int = 25,
        fld: int = 25,
        halve_every: int = 0,
        reset: int = 0,
        own: int = 0,
        fld_printed: int = 0,
    ) -> None:
        super().__init__(shape)
        self._of_last, self._of_uses, self._of_precise, self._of_distance = lru, lfu, lhu, fld
        self._halve_every, self._is_reset = halve_every, bool(reset)
        self._is_own, self._is_printed = bool(own), bool(fld_printed)
        self._tokens = 0
        self._last = np.zeros(shape.n_keys, dtype=np.int64)
        self._uses = np.zeros(shape.n_keys, dtype=np.int64)
        self._precise = np.zeros(shape.n_keys, dtype=np.int64)

    def begin_sequence(self) -> None:
        if self._is_reset:
            self.forward = self._tokens = 0
            for record in (self._last, self._uses, self._precise):
                record[:] = 0
            self._place_all()

    def begin_call(self, layer: int) -> None:
        before = self.forward
        super().begin_call(layer)
        if self.forward != before:
            if self._halve_every and self.forward % self._halve_every == 0:
                self._tokens >>= 1
                self._uses >>= 1
                self._precise >>= 1
                self._place_all()
            self._tokens += 1
        until = self.turns_until()
        nearness = until if self._is_printed else self.shape.n_layers - until + 1
        self.layer_ranks = self._tokens * self._of_distance * nearness

    def touch(self, key: int) -> None:
        self._count(key, is_precise=self._is_own or not self.shape.is_cheaper)
        self._place(key)

    add = touch

    def hear(self, key: int) -> None:
        self._count(key, is_precise=self.shape.is_cheaper and not self._is_own)
        if self.is_cached(key):
            self._place(key)

    def _count(self, key: int, *, is_precise: bool) -> None:
        self._last[key] = self.forward
        self._uses[key] += 1
        self._precise[key] += is_precise

    def _place(self, key: int) -> None:
        mixed = self._of_last * int(self._last[key]) + self._of_uses * int(self._uses[key])
        mixed += self._of_precise * int(self._precise[key])
        self.rank(key, self.shape.n_layers * mixed)

    def _place_all(self) -> None:
        for key in range(self.shape.n_keys):
            if self.is_cached(key):
                self._place(key)


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
        "halve-every": whole_number(
            "tokens after which uses are halved; 0: never, as published", default=0, least=0
        ),
        "reset": whole_number(
            "1: records begin anew with every sequence, as published", default=0, most=1, least=0
        ),
        "own": whole_number(
            "1: `lhu` is of uses in the cache's own form; 0: in the primary one, as published",
            default=0,
            most=1,
            least=0,
        ),
        "fld-printed": whole_number(
            "1: `fld` goes by the layers since the turn of the expert's layer, as printed; 0: by "
            "those until its next turn",
            default=0,
            most=1,
            least=0,
        ),
    },
    source="arXiv:2411.01433",
    compiled="hobbit",
)
