"""Division of a layer's missing experts between reading them and answering them in another way."""


def count_reads(n_free: int, n_forced: int, *, read_cost: float, other_cost: float) -> int:
    """Return how many of the missing experts are read, the best-scored ones (SMoE's Algorithm 2,
    arXiv:2508.18983).

    Two pointers run over the experts by falling score: while reads have cost no more than the
    answers so far, the left one reads the best expert left, else the right one answers the worst.
    So the dearer of both ways takes at most one cost longer than under the best division.
    Deviation: experts that can only be read stand before all others, as reads already begun.

    Args:
        n_free: missing experts that can be answered either way.
        n_forced: missing experts that can only be read.
        read_cost, other_cost: mean cost of one expert each way, in one unit, at least 0.

    Returns:
        How many of the `n_free` are read.
    """
    left, right = 0, n_free - 1
    reading, answering = n_forced * read_cost, 0.0
    while left <= right:
        if reading <= answering:
            left, reading = left + 1, reading + read_cost
        else:
            right, answering = right - 1, answering + other_cost
    return left
