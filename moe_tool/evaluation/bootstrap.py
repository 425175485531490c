"""Confidence intervals by resampling sequences, which, unlike their tokens, are independent."""

from collections.abc import Callable

import numpy as np

N_RESAMPLES = 1000
_MOST_VALUES = 2**20
"""Resampled values in memory at once"""


def bootstrap_interval(
    values: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    seed: int,
    n_resamples: int = N_RESAMPLES,
) -> tuple[float, float] | None:
    """Return the 2.5th and 97.5th percentile of a statistic over resampled sequences.

    Source: the block bootstrap with one sequence per block, percentile method (Efron and Tibshirani
    1993, ch. 13).

    Args:
        values: [N, ...] measurements, one row per sequence.
        statistic: [R, N, ...] -> [R], the figure of each of R resamples.
        seed: the same seed draws the same sequences for all statistics.
        n_resamples: R.

    Returns:
        (low, high), or None for fewer than two sequences.
    """
    n_sequences = values.shape[0]
    if n_sequences < 2:
        return None
    draws = np.random.default_rng(seed).integers(n_sequences, size=(n_resamples, n_sequences))
    at_once = max(1, _MOST_VALUES // max(1, values.size))
    figures = np.concatenate(
        [statistic(values[draws[at : at + at_once]]) for at in range(0, n_resamples, at_once)]
    )
    low, high = np.percentile(figures, (2.5, 97.5))
    return float(low), float(high)
