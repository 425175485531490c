"""Everything that happened while a model ran.

An access is a unique (forward, layer, expert); a hit finds it resident when the layer is called.
Prompt and decode are counted apart: `hit_rate` and `bytes_read_per_token` are of decode.
"""

from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class PhaseCounters:
    """Counters of one phase."""

    forwards: int = 0
    tokens: int = 0
    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    """Prefetched ones included"""
    whole_bytes: int = 0
    """Bytes that the misses of experts in channels would have read of whole records"""
    channels: int = 0
    """Channels of the experts in channels that were used"""
    channels_used: int = 0
    """Channels that were computed"""
    prefetches: int = 0
    """Experts that the store was told to expect"""
    prefetch_hits: int = 0
    """Prefetched experts that the next layer wanted; they count as hits too"""
    prefetched_bytes: int = 0
    stall_seconds: float = 0.0
    """Time in which the computation waited for a read"""
    substitutions: int = 0
    """(token, expert) slots answered by another expert"""
    replica_answers: int = 0
    """(token, expert) slots answered by a cheaper form of the expert"""
    drops: int = 0
    """(token, expert) slots answered by nothing"""
    skipped_fetch_bytes: int = 0
    """Bytes of non-resident experts that were not fetched because they were dropped"""

    def __add__(self, other: "PhaseCounters") -> "PhaseCounters":
        """Return the sum of each counter."""
        names = self.__slots__
        return PhaseCounters(**{name: getattr(self, name) + getattr(other, name) for name in names})

    @property
    def hit_rate(self) -> float:
        """Hits over accesses; 1 when there were none."""
        accesses = self.hits + self.misses
        return self.hits / accesses if accesses else 1.0

    @property
    def sparsity(self) -> float:
        """Share of the channels of used experts that was left out; 0 when there were none."""
        return 1 - self.channels_used / self.channels if self.channels else 0.0


@dataclass(slots=True, kw_only=True)
class RunStats:
    """Counters of a run."""

    prompt: PhaseCounters = field(default_factory=PhaseCounters)
    decode: PhaseCounters = field(default_factory=PhaseCounters)

    def __add__(self, other: "RunStats") -> "RunStats":
        """Return the sum of each counter of each phase."""
        return RunStats(prompt=self.prompt + other.prompt, decode=self.decode + other.decode)

    def phase(self, name: str) -> PhaseCounters:
        """Return the counters of "prompt" or "decode"."""
        return self.prompt if name == "prompt" else self.decode

    def count(self, name: str, counters: PhaseCounters) -> None:
        """Add to the counters of "prompt" or "decode"."""
        if name == "prompt":
            self.prompt += counters
        else:
            self.decode += counters
