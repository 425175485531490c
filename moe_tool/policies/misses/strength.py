"""Settings of a policy from the strongest to the weakest, for `calibrate` to search."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

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


class Strength(Protocol):
    """Parameter that controls how lossy a policy is."""

    @property
    def parameter(self) -> str:
        """Name of the parameter."""

    def grid(self, inputs: PolicyInputs) -> StrengthGrid:
        """Return the first strengths of a search.

        Args:
            inputs: inputs known without the model.

        Raises:
            UsageError: the bundle lacks data that the strengths depend on.
        """


def _everything(inputs: PolicyInputs) -> float:
    return 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareStrength:
    """Strength measured as a share."""

    parameter: str
    falls: bool = False
    """Whether the parameter falls with strength"""
    most: Callable[[PolicyInputs], float] = _everything
    """Largest value that the parameter can have"""

    def grid(self, inputs: PolicyInputs) -> StrengthGrid:
        """Return shares of the largest value; see `Strength`."""
        most = self.most(inputs)

        def value(strength: float) -> float:
            share = most * (1 - strength if self.falls else strength)
            return min(most, float(f"{share:.6g}"))  # 2/3 in six digits is more than 2/3

        return StrengthGrid(
            points=_SHARES,
            value=value,
            middle=lambda low, high: (low + high) / 2,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceStrength:
    """Strength measured in nats per MB of avoided reads."""

    parameter: str
    policy: str
    """Name of the policy, for a refusal"""

    def grid(self, inputs: PolicyInputs) -> StrengthGrid:
        """Return powers of ten around the bundle's typical price; see `Strength`."""
        PRICES.require(self.policy, inputs)
        assert inputs.prices is not None
        typical = inputs.prices.typical_nats_per_mb
        return StrengthGrid(
            points=(math.inf, *(typical * factor for factor in _NATS_PER_MB_FACTORS)),
            value=lambda s: float(f"{s:.6g}"),
            middle=lambda low, high: math.sqrt(low * high) if math.isfinite(high) else 10 * low,
        )
