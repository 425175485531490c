"""Description of an eviction policy in its own file: name, help, parameters, needs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from moe_tool.policies.eviction.protocol import CacheShape, Eviction, Hint
from moe_tool.policies.parameters import Parameter


class MakesEviction(Protocol):
    """An eviction policy's class."""

    @property
    def hints(self) -> frozenset[Hint]:
        """Notes that the policy wants beside the accesses."""

    def __call__(self, *args: Any, **kwargs: Any) -> Eviction:
        """Return a fresh policy for a `CacheShape`, given its parameters by name."""


class SizesNotes(Protocol):
    """Bytes of what a policy remembers."""

    def __call__(self, parameters: Mapping[str, int], *, n_layers: int, n_experts: int) -> int:
        """Return the bytes for a model of so many layers of so many experts."""


def few_notes(parameters: Mapping[str, int], *, n_layers: int, n_experts: int) -> int:
    """Return 0: the policy remembers a few numbers per expert, which no account lists."""
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictionSpec:
    """Everything that the tool has to know of one eviction policy."""

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
    """Part of the slots that the profile's hottest experts hold for the whole run"""
    compiled: str | None = None
    """Name of the same rule in native/replay.py; None: Python replays it"""
    is_stack: bool = False
    """One pass over a trace answers for every capacity: the least recently used leaves"""
    look_ahead: str | None = None
    """Parameter that says for how many layers to come it wants predictions; None: for none"""
    notes_bytes: SizesNotes = few_notes

    def build(self, shape: CacheShape, parameters: Mapping[str, int]) -> Eviction:
        """Return a fresh policy."""
        named = {name.replace("-", "_"): value for name, value in parameters.items()}
        return self.make(shape, **named)
