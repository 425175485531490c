"""Description of a miss policy in its own file: name, help, parameters, needs, test settings."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from moe_tool.policies.misses.needs import Need
from moe_tool.policies.misses.protocol import MissPolicy, PolicyInputs
from moe_tool.policies.misses.strength import Strength
from moe_tool.policies.parameters import Parameter

Values = Mapping[str, float]
"""Parameter -> value"""
Residents = Literal["hottest", "two-precisions", "cheapest"]
"""Rule for residents under frozen residency: the experts used most; those and, in a part of the
memory, the cheaper forms of those that follow; or the set that makes the expected price least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySpec:
    """Everything that the tool has to know of one miss policy."""

    name: str
    """Name that `--policy` takes"""
    summary: str
    """Answer to a missing expert, in words that follow the name"""
    make: Callable[[PolicyInputs, Values], MissPolicy]
    """Function from inputs that meet the needs and all values to the policy; raises UsageError
    where a value does not fit the inputs"""
    inert: str
    """Parameters with which it answers as `exact` does"""
    fires: str | None = ""
    """Parameters with which it changes answers wherever experts are missing; None: it never does"""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    needs: tuple[Need, ...] = ()
    """Inputs that it cannot do without, in the order in which they are checked"""
    residents: Residents = "hottest"
    acts_on_hits: bool = False
    """Whether experts that are in memory are left out too"""
    strength: Strength | None = None
    """The parameter that `calibrate` searches; None: there is nothing to search"""
    alternatives: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Other parameters and their values, which `calibrate` tries at the strength that it found
    where experts are substituted"""
    in_controls: bool = True
    """Whether it is a row of the table of `evaluate --controls`"""
    controls: Callable[[Values, PolicyInputs], tuple[str, ...] | None] | None = None
    """Function from values to the policies that stand beside it in that table instead of the usual
    ones; it may return None for those too"""
    source: str = ""
    """Paper of the rule, with what it is there"""

    @property
    def is_lossy(self) -> bool:
        """Whether the output may differ from the exact one."""
        return self.fires is not None

    def named(self, words: str) -> str:
        """Return the policy's name with parameters, as `--policy` takes both."""
        return f"{self.name}:{words}" if words else self.name
