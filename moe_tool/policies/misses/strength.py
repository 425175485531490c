"""Settings of a policy from the strongest to the weakest, for `calibrate` to search."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from moe_tool.policies.misses.needs import PRICES
from moe_tool.policies.misses.protocol import PolicyInputs

_SHARES = (1.0, 0.75, 0.5, 0.25, 0.1)
_NATS_PER_MB_FACTORS = (0.3, 0.03, 0.003, 0.0003)
"""Multiples of the typical nats per MB; infinity, which never reads, comes before them"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StrengthGrid:
    """Strengths to measure; a larger one saves more reads and costs more divergence."""

    points: tuple[float, ...]
    """Strengths in descending order"""
    value: Callable[[float], float]
    """Function from a strength to the parameter's value"""
    middle: Callable[[float, float], float]
    """Function from two strengths, the lower first, to one between them"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Strength:
    """Parameter that controls how lossy a policy is."""

    parameter: str
    grid: Callable[[PolicyInputs], StrengthGrid]
    """Function from the inputs known without the model to the first strengths of a search; raises
    UsageError if the bundle lacks data that these depend on"""


def share_strength(
    parameter: str,
    *,
    falls: bool = False,
    most: Callable[[PolicyInputs], float] = lambda inputs: 1.0,
) -> Strength:
    """Return a strength that is a share of a parameter's largest value, which `most` returns;
    `falls` if the parameter falls with strength."""

    def grid(inputs: PolicyInputs) -> StrengthGrid:
        largest = most(inputs)

        def value(strength: float) -> float:
            share = largest * (1 - strength if falls else strength)
            return min(largest, float(f"{share:.6g}"))  # 2/3 in six digits is more than 2/3

        return StrengthGrid(points=_SHARES, value=value, middle=lambda low, high: (low + high) / 2)

    return Strength(parameter=parameter, grid=grid)


def price_grid(inputs: PolicyInputs) -> StrengthGrid:
    """Return strengths in nats per MB of avoided reads: powers of ten around the typical price."""
    PRICES.require("priced", inputs)
    assert inputs.prices is not None
    typical = inputs.prices.typical_nats_per_mb
    return StrengthGrid(
        points=(math.inf, *(typical * factor for factor in _NATS_PER_MB_FACTORS)),
        value=lambda s: float(f"{s:.6g}"),
        middle=lambda low, high: math.sqrt(low * high) if math.isfinite(high) else 10 * low,
    )
