"""Choice of the residents and their forms that makes misses cheapest: facility location with costs,
greedily by the price saved per byte."""

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moe_tool.artifacts.expert_ids import ExpertKey
from moe_tool.artifacts.routing import PRIMARY
from moe_tool.policies.misses.price_book import LayerBook, PriceBook

_COVER_AT_MOST = 1.25
"""Largest increase of the expected price, as a factor, for an answer to every miss"""
_COVER_AT_MOST_IF_READ = 1.1
"""Largest increase of the expected price, as a factor, if a miss may be read as well"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidentChoice:
    """Chosen residents."""

    by_form: tuple[tuple[ExpertKey, ...], ...]
    """Experts held in each form, in the order of choice; each expert in one form at most"""
    nats_per_token: float
    """Expected price of all misses with the cheapest answers, reads included at `nats_per_mb`"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertUse:
    """Use of one layer's experts, on average over all tokens."""

    squared_gate: np.ndarray
    """[E] float64: squared gate weight, 0 for tokens that do not want the expert"""
    load: np.ndarray
    """[E] float64: share of tokens that want each expert"""


class _Layer:
    """Costs of the answers that one layer's residents give so far, in nats per token."""

    def __init__(self, use: ExpertUse, book: LayerBook, nats_per_mb: float) -> None:
        self.held: dict[int, int] = {}  # expert -> form
        self.sizes = book.record_bytes
        self.is_stored = np.isfinite(book.eps) & (self.sizes > 0)
        self._whole = use.squared_gate * book.nats  # [E]: price of dropping
        self._in_form = self._whole * np.minimum(book.eps, 1.0) ** 2  # [F, E]
        self._stand_in = self._whole[:, None] * _stand_ins(book.buddy, book.buddy_eps) ** 2
        # Cost of reading a miss in the cheapest form for that: no answer costs more.
        often = np.where(use.load > 0, use.load, 1.0)  # an unused expert costs nothing anyway
        reading = nats_per_mb * np.maximum(self.sizes, 1) / 1e6
        read = np.where(self.is_stored, often * reading + self._in_form, np.inf)
        self._other = np.minimum(self._whole, read.min(axis=0))
        self._self = self._whole.copy()

    @property
    def total(self) -> float:
        return float(np.minimum(self._self, self._other).sum())

    def added_bytes(self, expert: int, form: int) -> int:
        """Bytes that a form needs beyond the one held; 0 or less if it is no step up."""
        if not self.is_stored[form, expert]:
            return 0
        before = self.held.get(expert)
        return int(self.sizes[form, expert] - (0 if before is None else self.sizes[before, expert]))

    def gain(self, expert: int, form: int) -> float:
        best = np.minimum(self._self, self._other)
        saved = best[expert] - min(self._in_form[form, expert], self._other[expert])
        if form == PRIMARY:
            others = np.maximum(best - self._stand_in[:, expert], 0.0)
            saved += others.sum() - others[expert]
        return float(saved)

    def hold(self, expert: int, form: int) -> None:
        self.held[expert] = form
        self._self[expert] = self._in_form[form, expert]
        if form == PRIMARY:
            np.minimum(self._other, self._stand_in[:, expert], out=self._other)


def cheapest_residents(
    book: PriceBook,
    use: Mapping[int, ExpertUse],
    *,
    room_bytes: int,
    nats_per_mb: float = math.inf,
) -> ResidentChoice:
    """Return residents with a low expected price of misses, by greedy search.

    A step adds an expert in some form, or replaces a form by a dearer one, whichever saves most per
    added byte. Gains only fall with further steps, so that they are updated for the best candidate
    alone. The search begins with every expert in its smallest form, if that fits and hardly costs
    anything: an expert that the profile never saw then has an answer without a read.

    Args:
        book, use, room_bytes: prices, use by decoder layer, and limit of the residents' size.
        nats_per_mb: worth of avoiding a read of 10^6 bytes. If it is low, memory goes to the most
            read experts; if it is infinite, to those that can answer most misses.
    """
    free = _search(book, use, nats_per_mb, {}, room_bytes)
    smallest = _smallest_forms(book)
    needed = sum(
        int(book.layers[layer].record_bytes[form, expert])
        for (layer, expert), form in smallest.items()
    )
    if needed > room_bytes or all(form == PRIMARY for form in smallest.values()):
        return free
    everybody = _search(book, use, nats_per_mb, smallest, room_bytes)
    at_most = _COVER_AT_MOST if math.isinf(nats_per_mb) else _COVER_AT_MOST_IF_READ
    is_cheap = everybody.nats_per_token <= at_most * free.nats_per_token
    return everybody if is_cheap else free


def residents_price(
    book: PriceBook,
    use: Mapping[int, ExpertUse],
    by_form: Sequence[Sequence[ExpertKey]],
    *,
    nats_per_mb: float = math.inf,
) -> float:
    """Return the expected price of misses with given residents, in nats per token.

    Args:
        by_form: experts held in each form.
        nats_per_mb: worth of avoiding a read, as in `cheapest_residents`.
    """
    layers = {at: _Layer(use[at], each, nats_per_mb) for at, each in book.layers.items()}
    for form, keys in enumerate(by_form):
        for layer, expert in keys:
            layers[layer].hold(expert, form)
    return sum(layer.total for layer in layers.values())


def _search(
    book: PriceBook,
    use: Mapping[int, ExpertUse],
    nats_per_mb: float,
    begin: Mapping[ExpertKey, int],
    room_bytes: int,
) -> ResidentChoice:
    """Search greedily from the residents `begin`, (layer, expert) -> form."""
    layers = {at: _Layer(use[at], each, nats_per_mb) for at, each in book.layers.items()}
    n_forms = len(book.record_bytes)
    order = dict(begin)
    left = room_bytes
    for (number, expert), form in begin.items():
        left -= layers[number].added_bytes(expert, form)
        layers[number].hold(expert, form)

    def candidate(number: int, expert: int, form: int) -> tuple[float, int, int, int, int] | None:
        layer = layers[number]
        added = layer.added_bytes(expert, form)
        if added <= 0:
            return None
        return (-layer.gain(expert, form) / added, number, expert, form, added)

    heap = [
        found
        for number, layer in layers.items()
        for expert in range(layer.sizes.shape[1])
        for form in range(n_forms)
        if (found := candidate(number, expert, form)) is not None
    ]
    heapq.heapify(heap)
    while heap:
        ratio, number, expert, form, added = heapq.heappop(heap)
        now = candidate(number, expert, form)
        if now is None or now[4] > left:
            continue
        if (now[0], now[4]) != (ratio, added):
            heapq.heappush(heap, now)
            continue
        layers[number].hold(expert, form)
        left -= added
        order.pop((number, expert), None)
        order[number, expert] = form
        for other in range(n_forms):  # a dearer form adds fewer bytes now
            again = candidate(number, expert, other)
            if again is not None:
                heapq.heappush(heap, again)
    by_form: list[list[ExpertKey]] = [[] for _ in range(n_forms)]
    for key, form in order.items():
        by_form[form].append(key)
    return ResidentChoice(
        by_form=tuple(tuple(keys) for keys in by_form),
        nats_per_token=sum(layer.total for layer in layers.values()),
    )


def free_for_residents(
    n_slots: int, free: int, record_bytes: Sequence[int], *, nats_per_mb: float
) -> int:
    """Return the bytes for residents: all slots but those for one token's misses, and one slot of
    every cheaper form if these may be read too.

    Args:
        n_slots: primary records that fit the budget.
        free: slots of them for one token's experts.
        record_bytes: record size by form.
        nats_per_mb: worth of avoiding a read of 10^6 bytes; if it is infinite, only prompts read,
            in primary forms.
    """
    room = (n_slots - free) * record_bytes[PRIMARY]
    return room if math.isinf(nats_per_mb) else room - sum(record_bytes[1:])


def _smallest_forms(book: PriceBook) -> dict[ExpertKey, int]:
    """Return (layer, expert) -> smallest form, for the stored experts."""
    found = {}
    for number, each in book.layers.items():
        is_stored = np.isfinite(each.eps) & (each.record_bytes > 0)
        sizes = np.where(is_stored, each.record_bytes, np.inf)
        for expert in np.flatnonzero(is_stored.any(axis=0)).tolist():
            found[number, expert] = int(sizes[:, expert].argmin())
    return found


def _stand_ins(buddy: np.ndarray, eps: np.ndarray) -> np.ndarray:
    """Return the relative error of expert j in place of i, [E, E]; 1 if it is not listed."""
    n_experts = len(buddy)
    table = np.ones((n_experts, n_experts))
    row, column = np.nonzero(buddy >= 0)
    table[row, buddy[row, column]] = np.minimum(eps[row, column], 1.0)
    return table
