"""Settings of a policy from the strongest to the weakest, for `calibrate` to search."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from moe_tool.policies.misses.needs import PRICES
from moe_tool.policies.misses.protocol import PolicyInputs

_SHARES = (1.0, 0.75, 0.5, 0.25, 0.1)
_NATS_PER_MB_FACTORS = (0.3, 0.03, 0.003, 0.0003)
"""Times the typical price of a megabyte; infinity, which never reads, comes before them"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StrengthGrid:
    """Strengths to be measured; a larger one saves more and costs more."""

    points: tuple[float, ...]
    """Strengths in descending order"""
    value: Callable[[float], float]
    """Function from a strength to the parameter's value"""
    middle: Callable[[float, float], float]
    """Function from two strengths, the lower first, to one between them"""


class Strength(Protocol):
    """The parameter that says how far a policy goes."""

    @property
    def parameter(self) -> str:
        """Name of the parameter."""

    def grid(self, inputs: PolicyInputs) -> StrengthGrid:
        """Return where a search begins.

        Args:
            inputs: as far as they are known without the model.

        Raises:
            UsageError: the bundle lacks what the strengths follow from.
        """


def _everything(inputs: PolicyInputs) -> float:
    return 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareStrength:
    """A strength that is a share."""

    parameter: str
    falls: bool = False
    """The parameter is smaller the stronger the policy is"""
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
    """A strength in nats per megabyte: what avoiding a read may cost."""

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
