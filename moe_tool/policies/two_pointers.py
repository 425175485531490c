"""Division of a layer's missing experts between reading them and answering them in another way."""

from collections.abc import Sequence


def count_reads(
    read_costs: Sequence[float], other_costs: Sequence[float], *, begun: float = 0.0
) -> int:
    """Return how many of the missing experts are read, the best-scored ones (SMoE's Algorithm 2,
    arXiv:2508.18983).

    Two pointers run over the experts by falling score: while reads have cost no more than the
    answers so far, the left one reads the best expert left, else the right one answers the worst.
    So where both costs of an expert grow alike with its size, the dearer of both ways takes at most
    one expert longer than under the best division. Where one expert is cheaper to read than another
    and dearer to answer, there is no such bound: the order is that of scores.

    Args:
        read_costs, other_costs: cost of each expert that can be answered either way, [n] by falling
            score, in one unit, at least 0.
        begun: cost of the reads that have to be made in any case.

    Returns:
        How many of the n are read.
    """
    left, right = 0, len(read_costs) - 1
    reading, answering = begun, 0.0
    while left <= right:
        if reading <= answering:
            left, reading = left + 1, reading + read_costs[left]
        else:
            right, answering = right - 1, answering + other_costs[right]
    return left
