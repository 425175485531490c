"""Hot set: the most used experts of a layer, and the share of uses that a set answers."""

import numpy as np


def hottest(load: np.ndarray, *, n_hot: int) -> np.ndarray:
    """Return the ids of the most used experts, hottest first, ties by lower id.

    Args:
        load: [E] int64, uses of each expert.
        n_hot: size of the set, at most E.
    """
    return np.argsort(-load, kind="stable")[:n_hot]


def share_answered(load: np.ndarray, chosen: np.ndarray) -> float | None:
    """Return the share of the [E] loads that falls on the chosen experts, None without loads."""
    total = load.sum()
    return float(load[chosen].sum() / total) if total else None
