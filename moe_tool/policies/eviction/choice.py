"""An eviction policy by name, with its parameters: what `--eviction` takes."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_tool.errors import UsageError
from moe_tool.policies.eviction.expertflow import Expertflow
from moe_tool.policies.eviction.fifo import Fifo
from moe_tool.policies.eviction.hobbit import Hobbit
from moe_tool.policies.eviction.layer_lru import LayerLru
from moe_tool.policies.eviction.lfu import Lfu
from moe_tool.policies.eviction.lru import Lru
from moe_tool.policies.eviction.protocol import CacheShape, Eviction, Hint
from moe_tool.policies.eviction.s3_fifo import S3Fifo
from moe_tool.policies.eviction.smoe import Smoe

PER_LAYER = "per-layer"
_MAX_PARAMETER = 10**6
_DIGITS = re.compile(r"[0-9]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    make: Callable[..., Eviction]
    defaults: Mapping[str, int] = field(default_factory=dict)
    """Parameter -> value, in the order of the class's arguments"""
    pinned_share: float = 0.0


EVICTION: Mapping[str, _Kind] = {
    "lru": _Kind(make=Lru),
    "lfu": _Kind(make=Lfu, defaults={"halve-every": 64}),
    "fifo": _Kind(make=Fifo),
    "s3-fifo": _Kind(make=S3Fifo, defaults={"small": 10}),
    "static-hot": _Kind(make=Lru, pinned_share=1.0),
    "pinned+lru": _Kind(make=Lru, pinned_share=0.5),
    "hobbit": _Kind(make=Hobbit, defaults={"lru": 25, "lfu": 25, "lhu": 25, "fld": 25}),
    "smoe": _Kind(make=Smoe, defaults={"window": 16}),
    "expertflow": _Kind(make=Expertflow, defaults={"window": 2}),
    "layer-lru": _Kind(make=LayerLru, defaults={"age": 25}),
}
"""Every eviction policy by its name. What a policy pins, it pins by the profile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictionChoice:
    """A policy and its options."""

    kind: str
    """Key of EVICTION"""
    parameters: Mapping[str, int]
    """All of the kind's"""
    per_layer: bool = False
    """Whether every layer has its own equal part of the cache"""

    @property
    def name(self) -> str:
        """What `parse_eviction` makes this choice from; parameters at their defaults left out."""
        defaults = EVICTION[self.kind].defaults
        words = [f"{key}={n}" for key, n in self.parameters.items() if n != defaults[key]]
        if self.per_layer:
            words.append(PER_LAYER)
        return self.kind + (":" + ",".join(words) if words else "")

    @property
    def pinned_share(self) -> float:
        """Part of the slots that the hottest experts of the profile hold for good."""
        return EVICTION[self.kind].pinned_share

    @property
    def hints(self) -> frozenset[Hint]:
        """What the policy wants to be told beside the accesses."""
        made: Any = EVICTION[self.kind].make
        hints: frozenset[Hint] = made.hints
        return hints

    def notes_bytes(self, *, n_layers: int, n_experts: int) -> int:
        """Return what the policy remembers beyond a few numbers per expert: what `smoe` was told
        of a layer's `n_experts` experts in its window, in uint16."""
        return 2 * n_layers * n_experts * self.parameters["window"] if self.kind == "smoe" else 0

    def make(self, shape: CacheShape) -> Eviction:
        """Return a fresh policy."""
        named = {key.replace("-", "_"): value for key, value in self.parameters.items()}
        return EVICTION[self.kind].make(shape, **named)


def parse_eviction(text: str) -> EvictionChoice:
    """Return what a word like "lru", "lfu:halve-every=128" or "lru:per-layer" means.

    Raises:
        UsageError: the policy or a parameter is unknown, or its value is no number it can have.
    """
    kind, _, rest = text.strip().partition(":")
    if kind not in EVICTION:
        raise UsageError(
            f"--eviction {text}: {kind!r} is not known", hint=f"use one of {', '.join(EVICTION)}"
        )
    parameters, per_layer = dict(EVICTION[kind].defaults), False
    for word in rest.split(",") if rest else ():
        key, equals, value = word.partition("=")
        if key == PER_LAYER and not equals:
            per_layer = True
            continue
        known = ", ".join([*(f"{name}={n}" for name, n in parameters.items()), PER_LAYER])
        if key not in parameters or not _DIGITS.fullmatch(value):
            raise UsageError(f"--eviction {text}: {word!r} is not known", hint=f"it takes {known}")
        least = 0 if kind == "hobbit" else 1
        # By its length first: int() refuses thousands of digits.
        if len(value) > 9 or not least <= int(value) <= _MAX_PARAMETER:
            raise UsageError(
                f"--eviction {text}: {word!r} is out of range",
                hint=f"{least} to {_MAX_PARAMETER} are possible",
            )
        parameters[key] = int(value)
    if kind == "smoe" and parameters["window"] > 1024:
        raise UsageError(f"--eviction {text}: a window beyond 1024", hint="use a smaller one")
    return EvictionChoice(kind=kind, parameters=parameters, per_layer=per_layer)
