"""Who is to be in memory, and in which form, so that misses cost least: facility location with
costs, greedily by the price saved per byte."""

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moe_tool.artifacts.routing import FULL
from moe_tool.policies.hot_set import ExpertKey
from moe_tool.policies.misses.price_book import LayerBook, PriceBook

_COVER_AT_MOST = 1.25
"""Times the expected price, that an answer for everybody may cost"""
_COVER_AT_MOST_IF_READ = 1.1
"""The same where a miss may be read as well"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidentChoice:
    """What is in memory."""

    by_level: tuple[tuple[ExpertKey, ...], ...]
    """The experts held in each form, in the order in which they were chosen; each in one at most"""
    size_bytes: int
    nats_per_token: float
    """Expected price of all misses, each answered by what is cheapest, bytes to be read counted at
    their worth"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertUse:
    """How one layer's experts are used, on average over all tokens."""

    squared_gate: np.ndarray
    """[E] float64: squared gate weight; 0 where an expert is not wanted"""
    load: np.ndarray
    """[E] float64: share of tokens that want each expert"""


class _Layer:
    """The answers that one layer's experts have so far, in nats per token."""

    def __init__(self, use: ExpertUse, book: LayerBook, reading: np.ndarray) -> None:
        """Begin with nothing in memory.

        Args:
            use: of the experts.
            book: prices.
            reading: [L]: nats that the bytes of each form are worth.
        """
        self.held = np.full(len(book.nats), -1)  # level, -1: none
        self._whole = use.squared_gate * book.nats  # [E]: of nothing
        self._in_form = self._whole * np.minimum(book.eps, 1.0) ** 2  # [L, E]
        self._stand_in = self._whole[:, None] * _stand_ins(book.buddy, book.buddy_eps) ** 2
        # What a miss costs that is read, in the form for which that is least: nothing costs more.
        often = np.where(use.load > 0, use.load, 1.0)  # what is not wanted costs nothing anyway
        read = np.where(np.isfinite(book.eps), often * reading[:, None] + self._in_form, np.inf)
        self._other = np.minimum(self._whole, read.min(axis=0))
        self._own = self._whole.copy()

    @property
    def total(self) -> float:
        return float(np.minimum(self._own, self._other).sum())

    def gain(self, expert: int, level: int) -> float:
        best = np.minimum(self._own, self._other)
        saved = best[expert] - min(self._in_form[level, expert], self._other[expert])
        if level == FULL:
            others = np.maximum(best - self._stand_in[:, expert], 0.0)
            saved += others.sum() - others[expert]
        return float(saved)

    def hold(self, expert: int, level: int) -> None:
        self.held[expert] = level
        self._own[expert] = self._in_form[level, expert]
        if level == FULL:
            np.minimum(self._other, self._stand_in[:, expert], out=self._other)


def cheapest_residents(
    book: PriceBook,
    use: Mapping[int, ExpertUse],
    *,
    room_bytes: int,
    nats_per_mb: float = math.inf,
) -> ResidentChoice:
    """Return the residents that make the expected price of misses least, as a greedy search finds
    them.

    A step holds one more expert in some form, or one in a dearer form than before, whichever saves
    most per byte that it adds. What a step saves only falls while others are taken, so that gains
    are worked out anew for the best candidate alone. The search may begin with every expert in its
    smallest form: one that the profile never saw may be wanted all the same, and then there is an
    answer that needs no read. It does where that fits and hardly costs anything.

    Args:
        book: prices.
        use: by decoder layer.
        room_bytes: that the residents may take.
        nats_per_mb: what avoiding a read of 10^6 bytes is worth: where reading is cheap, memory is
            for what is read most; where nothing is read, for what can answer for most.
    """
    reading = np.array([nats_per_mb * size / 1e6 for size in book.record_bytes])
    free = _search(book, use, reading, {}, room_bytes)
    smallest = _smallest_forms(book)
    needed = sum(book.record_bytes[level] for level in smallest.values())
    if needed > room_bytes or all(level == FULL for level in smallest.values()):
        return free
    everybody = _search(book, use, reading, smallest, room_bytes)
    at_most = _COVER_AT_MOST if math.isinf(nats_per_mb) else _COVER_AT_MOST_IF_READ
    is_cheap = everybody.nats_per_token <= at_most * free.nats_per_token
    return everybody if is_cheap else free


def _search(
    book: PriceBook,
    use: Mapping[int, ExpertUse],
    reading: np.ndarray,
    begin: Mapping[tuple[int, int], int],
    room_bytes: int,
) -> ResidentChoice:
    """Search greedily from what `begin` holds: (layer, expert) -> level."""
    layers = {number: _Layer(use[number], each, reading) for number, each in book.layers.items()}
    sizes = book.record_bytes
    order = dict(begin)
    for (number, expert), level in begin.items():
        layers[number].hold(expert, level)
    left = room_bytes - sum(sizes[level] for level in begin.values())

    def candidate(number: int, expert: int, level: int) -> tuple[float, int, int, int, int] | None:
        layer = layers[number]
        before = layer.held[expert]
        added = sizes[level] - (sizes[before] if before >= 0 else 0)
        if added <= 0 or not np.isfinite(book.layers[number].eps[level, expert]):
            return None
        return (-layer.gain(expert, level) / added, number, expert, level, added)

    heap = [
        found
        for number, layer in layers.items()
        for expert in range(len(layer.held))
        for level in range(len(sizes))
        if (found := candidate(number, expert, level)) is not None
    ]
    heapq.heapify(heap)
    while heap:
        ratio, number, expert, level, added = heapq.heappop(heap)
        now = candidate(number, expert, level)
        if now is None or now[4] > left:
            continue
        if (now[0], now[4]) != (ratio, added):
            heapq.heappush(heap, now)
            continue
        layers[number].hold(expert, level)
        left -= added
        order.pop((number, expert), None)
        order[number, expert] = level
        for other in range(len(sizes)):  # a dearer form adds fewer bytes now
            again = candidate(number, expert, other)
            if again is not None:
                heapq.heappush(heap, again)
    by_level: list[list[ExpertKey]] = [[] for _ in sizes]
    for key, level in order.items():
        by_level[level].append(key)
    return ResidentChoice(
        by_level=tuple(tuple(keys) for keys in by_level),
        size_bytes=room_bytes - left,
        nats_per_token=sum(layer.total for layer in layers.values()),
    )


def free_for_residents(
    n_slots: int, free: int, record_bytes: Sequence[int], *, nats_per_mb: float
) -> int:
    """Return the bytes that residents may take: all slots but those in which one token's misses are
    read, and one slot of every cheaper form where these may be read too.

    Args:
        n_slots: of full experts, that the budget has room for.
        free: of them, for one token's experts.
        record_bytes: by level.
        nats_per_mb: what avoiding a read of 10^6 bytes is worth; if it is infinite only prompts are
            read for, and they are exact.
    """
    room = (n_slots - free) * record_bytes[FULL]
    return room if math.isinf(nats_per_mb) else room - sum(record_bytes[1:])


def _smallest_forms(book: PriceBook) -> dict[tuple[int, int], int]:
    """(layer, expert) -> the level of its smallest form."""
    ascending = sorted(range(len(book.record_bytes)), key=lambda level: book.record_bytes[level])
    return {
        (number, expert): next(level for level in ascending if np.isfinite(each.eps[level, expert]))
        for number, each in book.layers.items()
        for expert in range(len(each.nats))
    }


def _stand_ins(buddy: np.ndarray, eps: np.ndarray) -> np.ndarray:
    """[E, E]: relative error of column j in place of row i, 1 where it is not listed."""
    n_experts = len(buddy)
    table = np.ones((n_experts, n_experts))
    row, column = np.nonzero(buddy >= 0)
    table[row, buddy[row, column]] = np.minimum(eps[row, column], 1.0)
    return table
