"""Description of a miss policy in its own file: name, help, parameters, needs, inert setting."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from moe_tool.policies.misses.needs import Need
from moe_tool.policies.misses.protocol import MissPolicy, PolicyInputs
from moe_tool.policies.misses.strength import Strength
from moe_tool.policies.parameters import Parameter, changed_words

Values = Mapping[str, float]
"""Parameter -> value"""
Residents = Literal["hottest", "two-precisions", "beside-replicas", "cheapest"]
"""Rule for residents under frozen residency: the most used experts; these and, in a part of the
memory, cheaper forms of the next ones; or the set with the least expected price"""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PolicySpec:
    """Description of one miss policy."""

    name: str
    """Name that `--policy` takes"""
    summary: str
    """Answer to a missing expert, in words that follow the name"""
    make: Callable[[PolicyInputs, Values], MissPolicy]
    """Function from inputs that meet the needs and all values to the policy; raises UsageError if a
    value does not fit the inputs"""
    inert: str | None = None
    """Parameters with which it answers like `exact`; None: it always does"""
    fires: str = ""
    """Parameters with which it changes answers if experts are missing"""
    acts_on_hits: bool = False
    """Whether resident experts are dropped too"""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    needs: tuple[Need, ...] = ()
    """Required inputs, in the order in which they are checked"""
    residents: Residents = "hottest"
    weighs_prompts: bool = False
    """Whether lossy answers to a prompt need the importance of its tokens"""
    strength: Strength | None = None
    """Parameter that `calibrate` searches; None: there is none"""
    alternatives: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Values of other parameters that `calibrate` tries at the strength that it found, if experts
    are substituted"""
    in_controls: bool = True
    """Whether `evaluate --controls` has a row for it"""
    controls: Callable[[Values, PolicyInputs], tuple[str, ...] | None] | None = None
    """Function from values to the policies to compare with in that table; None: the usual ones"""
    replaces: Mapping[str, Values] = field(default_factory=dict)
    """Parameter -> values of others that it stands in place of: these become defaults where it is
    given"""
    presets: Mapping[str, Values] = field(default_factory=dict)
    """Words that stand for values of several parameters"""
    source: str = ""
    """Paper of the rule, with its name there"""

    @property
    def is_lossy(self) -> bool:
        """Whether the output may differ from the exact one."""
        return self.inert is not None

    def preset_words(self, preset: str) -> tuple[str, ...]:
        """Return "name=value" for every value of a preset that differs from its default."""
        return changed_words(self.presets[preset], self.parameters)
