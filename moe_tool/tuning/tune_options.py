"""Options of `tune weights`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from moe_tool.errors import UsageError
from moe_tool.tuning.eco import EcoRule, Optimizer, Rounding

RATES: Mapping[Optimizer, float] = {"sgd": 0.1, "adam": 0.01}
"""Default learning rates"""
FLOAT_RATE = 1e-3
"""Default learning rate of norms and routers"""
_LAST_RATE = 0.1
"""Final learning rate as a share of the first"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneOptions:
    """Options of tuning a bundle's codes."""

    steps: int = 500
    """Steps of every layer"""
    batch: int = 1024
    """Tokens of a step"""
    tokens: int = 65536
    """Tokens of text, all domains together, held-out ones included"""
    seq_len: int = 512
    optimizer: Optimizer = "sgd"
    rounding: Rounding = "nearest"
    feedback: Literal["momentum", "none"] = "momentum"
    """Destination of the rounding error; none: the control"""
    rate: float | None = None
    """First learning rate, in grid steps per update for a code whose gradient has the size of its
    matrix's mean first gradient; it falls linearly to a tenth. None: as RATES says"""
    norms: bool = False
    """Whether norms are trained once the codes are"""
    router: bool = False
    """Whether the routers are trained once the codes are; changes which experts tokens choose"""
    float_rate: float | None = None
    """First learning rate of norms and routers, as a share of a tensor's root mean square; it falls
    linearly to a tenth. 0: nothing moves. None: FLOAT_RATE"""
    seed: int = 0
    memory_bytes: int | None = None
    offline: bool = False

    @property
    def first_rate(self) -> float:
        """Learning rate of the first step."""
        return RATES[self.optimizer] if self.rate is None else self.rate

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        return self.first_rate * (1 - (1 - _LAST_RATE) * step / self.steps)

    @property
    def tunes_floats(self) -> bool:
        """Whether weights beside the experts are trained."""
        return self.norms or self.router

    @property
    def first_float_rate(self) -> float:
        """Learning rate of the first step of norms and routers."""
        return FLOAT_RATE if self.float_rate is None else self.float_rate

    @property
    def rule(self) -> EcoRule:
        """Rule by which a step changes codes"""
        return EcoRule(optimizer=self.optimizer, rounding=self.rounding, feedback=self.feedback)

    def require_possible(self) -> None:
        """Refuse numbers out of range.

        Raises:
            UsageError: a number is out of range.
        """
        for name, value in (("steps", self.steps), ("batch", self.batch)):
            if value < 1:
                raise UsageError(f"--{name} {value}: at least 1 is needed")
        if not 0 < self.first_rate <= 1e6:
            raise UsageError(f"--rate {self.first_rate:g}: not possible", hint="in codes, e.g. 0.1")
        if self.float_rate is not None and not self.tunes_floats:
            raise UsageError(
                "--float-rate is the rate of norms and routers, which are not trained",
                hint="add --norms or --router, or leave it out",
            )
        if not 0 <= self.first_float_rate <= 1:
            raise UsageError(
                f"--float-rate {self.first_float_rate:g}: not possible",
                hint=f"a share of the weights' size from 0 to 1, e.g. {FLOAT_RATE:g}",
            )
