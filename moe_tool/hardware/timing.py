"""Median duration of calls."""

import statistics
import time
from collections.abc import Callable, Sequence


def median_seconds(
    calls: Sequence[Callable[[], object]], *, repetitions: int, budget_s: float
) -> list[float]:
    """Return the median seconds of each call, after one warm-up that is not counted.

    Calls take turns, so that a slow moment of the machine affects all of them.

    Args:
        calls: each should touch other memory every time, where that matters.
        repetitions: maximum for each call.
        budget_s: seconds after which no other turn begins; two are made in any case.
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
