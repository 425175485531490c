"""Tables of equally spaced quantiles, as a profile keeps them."""

import numpy as np


def read_quantile(table: np.ndarray, share: float) -> float:
    """Return the quantile at a share from 0 to 1.

    Args:
        table: [n] quantiles at n equally spaced shares from 0 to 1, ascending.
        share: 0 to 1.
    """
    return float(np.interp(share, np.linspace(0, 1, len(table)), table))
