"""How long a call takes, by the median of a few."""

import statistics
import time
from collections.abc import Callable


def median_seconds(call: Callable[[], object], *, repetitions: int, budget_s: float) -> float:
    """Return the median of the repetitions, after one that is not counted.

    Args:
        call: takes other memory each time, where that matters.
        repetitions: at most.
        budget_s: no other repetition begins after so long; two are made in any case.
    """
    call()
    seconds: list[float] = []
    end = time.perf_counter() + budget_s
    while len(seconds) < repetitions and (len(seconds) < 2 or time.perf_counter() < end):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
