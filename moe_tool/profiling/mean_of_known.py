"""The mean of figures of which some could not be measured."""

from collections.abc import Iterable


def mean_of_known(values: Iterable[float | None]) -> float | None:
    """Return the mean of what is not None, None where all are."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
