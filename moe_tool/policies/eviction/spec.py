"""Description of an eviction policy in its own file: name, help, parameters, needs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from moe_tool.policies.eviction.protocol import Eviction
from moe_tool.policies.parameters import Parameter


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EvictionSpec:
    """Description of one eviction policy."""

    name: str
    """Name that `--eviction` takes"""
    summary: str
    """Experts that leave first, in words that follow the name"""
    make: type[Eviction]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    """Whole numbers by the name of the class's argument, with dashes"""
    source: str = ""
    """Paper or documentation of the rule"""
    pinned_share: float = 0.0
    """Share of the slots in which the profile's hottest experts are pinned"""
    compiled: str | None = None
    """Name of the same rule in native/replay.py; None: Python replays it"""
    look_ahead: str | None = None
    """Parameter with the number of coming layers to predict; None: no predictions"""
    notes_bytes: Callable[[Mapping[str, int]], int] = lambda parameters: 0
    """Function from parameters to the bytes of state per expert beyond a few numbers, which are not
    in the memory account"""
