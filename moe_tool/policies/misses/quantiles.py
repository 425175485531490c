"""Tables of equally spaced quantiles, as a profile keeps them."""

import numpy as np


def read_quantile(table: np.ndarray, share: float) -> float:
    """Return the value below which a share of what was counted lies.

    Args:
        table: [n], ascending: the quantiles at n shares from 0 to 1, equally spaced.
        share: 0 to 1.
    """
    return float(np.interp(share, np.linspace(0, 1, len(table)), table))
