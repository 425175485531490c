"""How long calls take, by the medians of a few turns."""

import statistics
import time
from collections.abc import Callable, Sequence


def median_seconds(
    calls: Sequence[Callable[[], object]], *, repetitions: int, budget_s: float
) -> list[float]:
    """Return the median of each call's repetitions, after one that is not counted.

    They are taken in turn, so that a slow moment of the machine falls on all of them.

    Args:
        calls: take other memory each time, where that matters.
        repetitions: at most, of each.
        budget_s: no other turn begins after so long; two are made in any case.
    """
    for call in calls:
        call()
    seconds: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + budget_s
    for turn in range(repetitions):
        if turn >= 2 and time.perf_counter() >= end:
            break
        for call, taken in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in seconds]
