"""Results of replaying traces by budget and policy, and of replaying a recorded run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

BELADY = "belady"
"""Eviction name in the rows of Belady's bound"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRow:
    """One budget under one policy."""

    memory: str
    slots: int
    expert_bytes: int
    """Size of the slots"""
    eviction: str
    hit_rate: float
    bytes_per_token: float
    """Bytes read from disk, prefetched ones included"""
    stall_ms: float
    """Mean stall per token"""
    tokens_per_second: float
    p50_ms: float
    p99_ms: float
    belady_hit_rate: float
    """Hit rate of the bound at this budget"""
    to_belady: float | None
    """Misses over those of the bound; None if the bound misses nothing, and for policies with fewer
    misses than the bound, because their pinned experts were resident before the first token"""
    limited_by: str
    """budget, policy, working set or -"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchRow:
    """Effect of prefetching at one budget."""

    memory: str
    eviction: str
    prefetch: str
    """Way to prefetch as `--prefetch` takes it"""
    accuracy: float
    """Share of the prefetched experts that was wanted"""
    bytes_per_saved_byte: float | None
    """Prefetched bytes per byte of demand reads saved; None if none was saved"""
    stall_saved_ms: float
    """Stall saved per token; negative if prefetching costs more than it saves"""
    pays: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePenalty:
    """Cost of the misses of two caches under one eviction policy."""

    eviction: str
    """Name of the policy"""
    reads_per_token: float
    """Primary records read per token; a cheaper one counts as its share of bytes"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRow:
    """Cost of a prompt's tokens at one budget under one policy."""

    memory: str
    eviction: str
    hit_rate: float
    belady_hit_rate: float
    bytes_per_token: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Cliff:
    """Smallest cache in which LRU hits at all."""

    experts: float
    """Experts that one token uses, all layers together"""
    bytes: int
    """Size of their slots"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyHits:
    """Replay of the run's calls under one policy."""

    eviction: str
    hit_rate: float
    """Hit rate of decoding"""
    bytes_per_token: float
    """Bytes read while decoding, prefetched ones included"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunComparison:
    """Counters of a run beside those predicted from its calls, of decoding unless named prompt."""

    hits: int
    predicted_hits: int
    prompt_hits: int
    predicted_prompt_hits: int
    prefetch_hits: int
    predicted_prefetch_hits: int
    tokens_per_second: float
    predicted_tokens_per_second: float
    stall_ms: float
    """Per token"""
    predicted_stall_ms: float
    policies: tuple[PolicyHits, ...]
    """Policies that prefetch as the run did, then the bound, which prefetches nothing: a run with
    prefetching may have more hits"""

    @property
    def is_equal(self) -> bool:
        """Whether every predicted count equals the run's."""
        return (self.hits, self.prompt_hits, self.prefetch_hits) == (
            self.predicted_hits,
            self.predicted_prompt_hits,
            self.predicted_prefetch_hits,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationReport:
    """A profile's trace under every budget and policy."""

    profile: Path
    model: str
    hardware: str
    """Name of the machine that times are for"""
    bits: str
    """Bits of the experts: native, 8, 4"""
    part: str
    """Tokens that were replayed: held-out, or in-sample where nothing is held out"""
    tokens: int
    experts: int
    """Experts of all layers"""
    rows: tuple[SimulatedRow, ...]
    """Decoding, budget by budget, the bound last"""
    gaps: tuple[tuple[str, str], ...]
    """Skipped (budget, policy) pairs: a layer's share of the cache is below one token's experts"""
    prompt_rows: tuple[PromptRow, ...]
    unheard: tuple[str, ...]
    """Policies left out of the prompt rows, which have no router scores"""
    prefetch_rows: tuple[PrefetchRow, ...]
    cliff: Cliff
    warnings: tuple[str, ...]
    accesses_per_second: float

    def best(self) -> list[SimulatedRow]:
        """Return the fastest row of each budget."""
        return [
            best_policy(self.rows, label) for label in dict.fromkeys(r.memory for r in self.rows)
        ]


def best_policy(rows: Sequence[SimulatedRow], memory: str) -> SimulatedRow:
    """Return the fastest row of a budget without the bound; the first of equals."""
    at_budget = [row for row in rows if row.memory == memory and row.eviction != BELADY]
    return max(at_budget, key=lambda row: row.tokens_per_second)


def rows_by_policy(rows: Sequence[SimulatedRow]) -> Mapping[str, list[SimulatedRow]]:
    """Return each policy's rows, by budget; the bound last."""
    grouped: dict[str, list[SimulatedRow]] = {}
    for row in sorted(rows, key=lambda row: (row.eviction == BELADY, row.slots)):
        grouped.setdefault(row.eviction, []).append(row)
    return grouped
