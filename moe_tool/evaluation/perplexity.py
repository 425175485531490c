"""Perplexity from nats per token."""

import math

import numpy as np


def perplexity(nll: np.ndarray) -> float:
    """Return exp of the mean.

    Args:
        nll: [...] float64 nats per predicted token, at least one.

    Returns:
        Perplexity; inf where the mean is too large for a float.
    """
    try:
        return math.exp(float(nll.mean()))
    except OverflowError:
        return math.inf
