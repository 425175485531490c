"""Counters of a run, for prompt and decode separately.

An access is a unique (forward, layer, expert); a hit finds it resident when the layer is called.
"""

from dataclasses import dataclass, field, fields
from typing import Any, Self

from moe_tool.artifacts.json_fields import Spread, object_fields


@dataclass(slots=True)
class PhaseCounters(Spread):
    """Counters of one phase."""

    forwards: int = 0
    tokens: int = 0
    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    """Bytes read from the bundle, prefetched ones included"""
    whole_bytes: int = 0
    """Bytes that misses would have read, had every channel been read"""
    channels: int = 0
    """Channels of the used experts that are stored in channels"""
    channels_used: int = 0
    """Channels that were computed"""
    prefetches: int = 0
    prefetch_hits: int = 0
    """Prefetched experts that the next layer wanted; counted as hits too"""
    prefetched_bytes: int = 0
    stall_seconds: float = 0.0
    """Time that the computation waited for reads"""
    substitutions: int = 0
    """(token, expert) slots answered by another expert"""
    replica_answers: int = 0
    """(token, expert) slots answered by a replica of the expert"""
    drops: int = 0
    """(token, expert) slots answered by nothing"""
    skipped_fetch_bytes: int = 0
    """Bytes of non-resident experts that were not fetched because they were dropped"""

    def __add__(self, other: Self) -> Self:
        names = [each.name for each in fields(self)]
        return type(self)(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def keys_of(self, name: str, /) -> dict[str, Any]:
        """Return counters and rates, with the prefix `prompt_` in a field named `prompt`."""
        before = "prompt_" if name == "prompt" else ""
        return {f"{before}{key}": value for key, value in object_fields(self).items()}

    @property
    def hit_rate(self) -> float:
        """Hits over accesses; 1 without accesses."""
        accesses = self.hits + self.misses
        return self.hits / accesses if accesses else 1.0

    @property
    def prefetch_hit_rate(self) -> float:
        """Prefetched experts that were wanted, over all prefetched; 0 without any."""
        return self.prefetch_hits / max(1, self.prefetches)

    @property
    def sparsity(self) -> float:
        """Share of the used experts' channels that was skipped; 0 without channels."""
        return 1 - self.channels_used / self.channels if self.channels else 0.0

    @property
    def changed_answers(self) -> int:
        """(token, expert) slots not answered by the primary form of the wanted expert."""
        return self.substitutions + self.replica_answers + self.drops

    @property
    def bytes_read_per_token(self) -> float:
        """Bytes read from the bundle over tokens; 0 without tokens."""
        return self.bytes_read / max(1, self.tokens)

    @property
    def whole_bytes_per_token(self) -> float:
        return self.whole_bytes / max(1, self.tokens)

    @property
    def skipped_fetch_bytes_per_token(self) -> float:
        return self.skipped_fetch_bytes / max(1, self.tokens)


@dataclass(slots=True, kw_only=True)
class RunStats:
    """Counters of a run."""

    prompt: PhaseCounters = field(default_factory=PhaseCounters)
    decode: PhaseCounters = field(default_factory=PhaseCounters)

    def __add__(self, other: Self) -> Self:
        return type(self)(prompt=self.prompt + other.prompt, decode=self.decode + other.decode)

    def phase(self, name: str) -> PhaseCounters:
        """Return the counters of "prompt" or "decode"."""
        return self.prompt if name == "prompt" else self.decode

    def count(self, name: str, counters: PhaseCounters) -> None:
        """Add to the counters of "prompt" or "decode"."""
        setattr(self, name, self.phase(name) + counters)
