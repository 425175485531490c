"""Description of an eviction policy in its own file: name, help, parameters, needs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from moe_tool.policies.eviction.protocol import Eviction, Hint
from moe_tool.policies.parameters import Parameter


class MakesEviction(Protocol):
    """An eviction policy's class."""

    @property
    def hints(self) -> frozenset[Hint]:
        """Hints that the policy needs beside the accesses."""

    def __call__(self, *args: Any, **kwargs: Any) -> Eviction:
        """Return a fresh policy for a `CacheShape`, given its parameters by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictionSpec:
    """Description of one eviction policy."""

    name: str
    """Name that `--eviction` takes"""
    summary: str
    """Experts that leave first, in words that follow the name"""
    make: MakesEviction
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    """Whole numbers by the name of the class's argument, with dashes"""
    source: str = ""
    """Paper or documentation of the rule"""
    pinned_share: float = 0.0
    """Share of the slots in which the profile's hottest experts are pinned"""
    compiled: str | None = None
    """Name of the same rule in native/replay.py; None: Python replays it"""
    is_stack: bool = False
    """Whether one pass over a trace gives the misses at every capacity, as for LRU"""
    look_ahead: str | None = None
    """Parameter with the number of coming layers to predict; None: no predictions"""
    notes_bytes: Callable[[Mapping[str, int]], int] | None = None
    """Function from parameters to the bytes of state per expert; None: a few numbers, which are not
    in the memory account"""
