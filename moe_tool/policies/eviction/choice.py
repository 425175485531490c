"""Eviction policy with parameters, as `--eviction` names it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from moe_tool.errors import UsageError
from moe_tool.policies.eviction.protocol import CacheShape, Eviction, Hint
from moe_tool.policies.eviction.registry import EVICTION
from moe_tool.policies.eviction.spec import EvictionSpec
from moe_tool.policies.parameters import changed_words, read_values

PER_LAYER = "per-layer"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictionChoice:
    """A policy and its options."""

    spec: EvictionSpec
    parameters: Mapping[str, int] = field(hash=False)
    """Value of every parameter of the policy"""
    per_layer: bool = False
    """Whether every layer has its own equal part of the cache"""

    @property
    def name(self) -> str:
        """Text from which `parse_eviction` makes this choice; defaults left out."""
        words = changed_words(self.parameters, self.spec.parameters)
        words += (PER_LAYER,) * self.per_layer
        return self.spec.name + (":" + ",".join(words) if words else "")

    @property
    def hints(self) -> frozenset[Hint]:
        """Hints that the policy needs beside the accesses."""
        return self.spec.make.hints

    @property
    def look_ahead(self) -> int:
        """Number of coming layers that the policy needs predictions for."""
        name = self.spec.look_ahead
        return 0 if name is None else self.parameters[name]

    def notes_bytes(self, *, n_layers: int, n_experts: int) -> int:
        """Return the bytes of the policy's state beyond a few numbers per expert."""
        return self.spec.notes_bytes(self.parameters) * n_layers * n_experts

    def make(self, shape: CacheShape) -> Eviction:
        """Return a fresh policy."""
        named = {name.replace("-", "_"): value for name, value in self.parameters.items()}
        return self.spec.make(shape, **named)


def parse_eviction(text: str) -> EvictionChoice:
    """Parse a word like "lru", "lfu:halve-every=128" or "lru:per-layer".

    Raises:
        UsageError: the policy or a parameter is unknown, or a value is out of range.
    """
    kind, _, rest = text.strip().partition(":")
    if kind not in EVICTION:
        raise UsageError(
            f"--eviction {text}: {kind!r} is not known", hint=f"use one of {', '.join(EVICTION)}"
        )
    words = rest.split(",") if rest else []
    values = read_values(
        f"--eviction {text}",
        [word for word in words if word != PER_LAYER],
        EVICTION[kind].parameters,
        others=(PER_LAYER,),
    )
    return EvictionChoice(
        spec=EVICTION[kind],
        parameters={name: int(value) for name, value in values.items()},
        per_layer=PER_LAYER in words,
    )


DEFAULT_EVICTION = parse_eviction("lru")
