"""What a forward costs, explained by layers, bytes touched, bytes missed and multiply-adds."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """One row: what a forward did and how long it took."""

    label: str
    layers: int
    touched_bytes: float
    """Weights that the forward used, wherever they were"""
    missed_bytes: float
    """Of them, read from disk"""
    products: float
    """Multiply-adds"""
    seconds: float
    tokens: int
    """Of one forward"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """seconds = layer_s * layers + touched / memory + missed / disk (+ products / rate)."""

    layer_s: float
    memory_bytes_per_s: float
    disk_bytes_per_s: float
    products_per_s: float
    """Infinite where the term is left out or nothing speaks for it, as are the others"""

    def seconds(self, cost: Cost) -> float:
        """Return the prediction."""
        return (
            self.layer_s * cost.layers
            + cost.touched_bytes / self.memory_bytes_per_s
            + cost.missed_bytes / self.disk_bytes_per_s
            + cost.products / self.products_per_s
        )

    def __str__(self) -> str:
        text = (
            f"{1e3 * self.layer_s:.3f} ms per layer + touched bytes at "
            f"{self.memory_bytes_per_s / 1e9:.1f} GB/s + missed bytes at "
            f"{self.disk_bytes_per_s / 1e9:.2f} GB/s"
        )
        if np.isfinite(self.products_per_s):
            text += f" + products at {self.products_per_s / 1e9:.0f} G multiply-adds/s"
        return text


def fit_costs(costs: Sequence[Cost], *, with_products: bool) -> Fit:
    """Return the constants with the least sum of squared relative errors; none is negative.

    Args:
        costs: at least as many as constants.
        with_products: whether arithmetic has a term of its own, for forwards of many tokens.
    """
    terms = np.array([[c.layers, c.touched_bytes, c.missed_bytes, c.products] for c in costs])
    seconds = np.array([cost.seconds for cost in costs])
    if not with_products:
        terms[:, 3] = 0
    # Columns of like size, or the solver takes the small constants for zero.
    scale = np.maximum(np.abs(terms).max(axis=0), 1.0)
    constants, _ = nnls(terms / scale / seconds[:, None], np.ones(len(costs)))
    per_unit = constants / scale
    with np.errstate(divide="ignore"):
        rates = 1 / per_unit[1:]
    return Fit(
        layer_s=float(per_unit[0]),
        memory_bytes_per_s=float(rates[0]),
        disk_bytes_per_s=float(rates[1]),
        products_per_s=float(rates[2]),
    )
