"""Calls timed in turn, so that a slow minute of the machine falls on all of them alike."""

import time
from collections.abc import Callable, Mapping

_PAUSE_S = 0.003
"""Idle threads of the call before spin for a while; on few cores they would take a core from the
next one"""

Call = Callable[[], object]


def time_in_turn(calls: Mapping[str, Call], *, repetitions: int) -> dict[str, list[float]]:
    """Return the seconds of each call, by name, one entry per repetition.

    Before every timed call the same one runs once untimed: its threads are awake and its scratch is
    there, as in a model that calls it layer after layer. Calls are expected to take another copy of
    their weights each time.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, call in calls.items():
            time.sleep(_PAUSE_S)
            call()
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds
