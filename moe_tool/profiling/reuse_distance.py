"""Reuse (stack) distances: distinct other experts used between two uses of one expert (Mattson et
al. 1970, IBM Systems J. 9(2)).

The distance of a use i whose expert was last used at p is the number of first uses of experts after
p: of j in p < j < i with prev(j) < p. All p + 1 uses up to p have prev(j) < p too, so it is a count
of smaller values to the left minus p + 1, done by splitting positions bit by bit in n log n.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from moe_tool.artifacts.routing_report import ReuseBin, ReuseHistogram

_BLOCK_USES = 2**17
"""Uses processed at once, so that the arrays stay in the CPU cache"""


def reuse_histogram(uses: np.ndarray, *, n_experts: int) -> ReuseHistogram:
    """Return the histogram of the reuse distances of [U] integers below `n_experts`; U may be 0."""
    n_bins = int(n_experts - 1).bit_length() + 1
    counts = np.zeros(n_bins, np.int64)
    first_uses = 0
    for distance in reuse_distances(uses, n_experts):
        again = distance[distance >= 0]
        first_uses += len(distance) - len(again)
        counts += np.bincount(np.frexp(again)[1], minlength=n_bins)  # bits of the distance
    return _histogram(first_uses, counts.tolist())


def merged(histograms: Sequence[ReuseHistogram]) -> ReuseHistogram:
    """Return the sum of one or more histograms with the same bins."""
    columns = zip(*(histogram.bins for histogram in histograms), strict=True)
    return _histogram(
        sum(histogram.first_uses for histogram in histograms),
        [sum(one.uses for one in column) for column in columns],
    )


def _histogram(first_uses: int, counts: Sequence[int]) -> ReuseHistogram:
    bins = tuple(
        ReuseBin(low=2 ** (bits - 1) if bits else 0, high=2**bits - 1, uses=count)
        for bits, count in enumerate(counts)
    )
    return ReuseHistogram(uses=first_uses + sum(counts), first_uses=first_uses, bins=bins)


def reuse_distances(uses: np.ndarray, n_experts: int) -> Iterator[np.ndarray]:
    """Yield [U] int32 distances block by block; -1: a first use.

    Each block is preceded by the experts used so far in order of their last use: nothing else of
    the past matters.
    """
    size = _up_to_power_of_two(max(_BLOCK_USES, 4 * n_experts))
    recent = uses[:0]  # the least recently used first
    start = 0
    while start < len(uses):
        block = np.concatenate([recent, uses[start : start + size - len(recent)]])
        yield _distances(block)[len(recent) :]
        start += len(block) - len(recent)
        last_use = np.full(n_experts, -1)
        last_use[block] = np.arange(len(block))  # numpy keeps the last value of a repeated index
        recent = np.argsort(last_use)[int((last_use < 0).sum()) :].astype(uses.dtype)


def _distances(uses: np.ndarray) -> np.ndarray:
    """Return [U] int32 distances, -1 for a first use."""
    count = len(uses)
    order = np.argsort(uses, kind="stable")
    same = np.flatnonzero(uses[order[1:]] == uses[order[:-1]])
    earlier, later = order[same], order[same + 1]  # neighbouring uses of one expert
    previous = np.full(count, -1)
    previous[later] = earlier
    following = np.full(count, -1)
    following[earlier] = later
    by_previous = [
        np.flatnonzero(previous < 0),
        following[following >= 0],
        np.arange(count, _up_to_power_of_two(count)),
    ]
    smaller = _smaller_before(np.concatenate(by_previous))[:count]
    return np.where(previous < 0, -1, smaller - previous - 1).astype(np.int32)


def _smaller_before(order: np.ndarray) -> np.ndarray:
    """Return for every position how many positions before it have a smaller value.

    Args:
        order: [n] positions 0 to n - 1 by ascending value, n a power of two.
    """
    smaller = np.zeros(len(order), np.int64)
    half = len(order) // 2
    while half:
        # `order` consists of runs over 2 * half neighbouring positions; the late half of a run's
        # positions come after its early half.
        is_late = (order & half) != 0
        where = np.flatnonzero(is_late)
        late = order[where]
        n_late_before = np.arange(len(where)) & (half - 1)
        smaller[late] += (where & (2 * half - 1)) - n_late_before
        halves = (order[~is_late].reshape(-1, half), late.reshape(-1, half))
        order = np.stack(halves, axis=1).reshape(-1)
        half //= 2
    return smaller


def _up_to_power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()
