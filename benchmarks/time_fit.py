"""Time per token as a polynomial of a policy's strength, and the least strength within a limit."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_tool.errors import UsageError

_STEPS = 1000
"""Steps of the search between the weakest and the strongest measured setting"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeFit:
    """T(alpha) fitted to a few runs (SMoE, arXiv:2508.18983)."""

    coefficients: tuple[float, ...]
    """Coefficients of the polynomial, the highest power first"""
    residuals: tuple[float, ...]
    """Measured less fitted time of each run, in the unit of the times"""
    least: float
    """Weakest measured strength"""
    most: float
    """Strongest measured strength"""

    def time_at(self, strength: float) -> float:
        """Return the fitted time."""
        return float(np.polyval(self.coefficients, strength))

    def weakest_within(self, limit: float) -> float | None:
        """Return the least strength between the measured ones whose fitted time is within the
        limit; None: there is none."""
        strengths = np.linspace(self.least, self.most, _STEPS + 1)
        is_within = np.polyval(self.coefficients, strengths) <= limit
        return float(strengths[is_within.argmax()]) if is_within.any() else None


def fit_times(strengths: Sequence[float], times: Sequence[float], *, degree: int = 2) -> TimeFit:
    """Fit a polynomial to times at a few strengths, by least squares.

    Raises:
        UsageError: fewer different strengths than the polynomial has coefficients, or a time is
            not finite.
    """
    if len(set(strengths)) <= degree or len(strengths) != len(times):
        raise UsageError(
            f"{len(set(strengths))} settings do not determine a polynomial of degree {degree}",
            hint=f"measure at least {degree + 1} different settings",
        )
    if not np.isfinite([*strengths, *times]).all():
        raise UsageError("a measured time is not finite", hint="measure it again")
    coefficients = np.polyfit(strengths, times, degree)
    residuals = np.asarray(times) - np.polyval(coefficients, strengths)
    return TimeFit(
        coefficients=tuple(coefficients.tolist()),
        residuals=tuple(residuals.tolist()),
        least=min(strengths),
        most=max(strengths),
    )
