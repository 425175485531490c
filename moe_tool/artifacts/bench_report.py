"""Rows of a speed measurement."""

import statistics
from dataclasses import dataclass
from typing import Literal

from moe_tool.artifacts.json_fields import Spread
from moe_tool.artifacts.run_result import RunSetup
from moe_tool.artifacts.run_stats import PhaseCounters

CacheState = Literal["cold", "warm"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchedBundle(Spread):
    """The bundle that a row was measured on."""

    model: str
    size_bytes: int
    """Sum of the bundle's files"""
    params: int
    """Weights in the bundle, experts and skeleton; a tied head's own copy counts"""
    bits: str
    """Bits of the experts: native, 8, 4, ... or mixed"""
    skeleton_bits: str
    """Bits of the matrices outside experts and routers: native, 8, 4"""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRow:
    """One row of the table: all repetitions of one test under one setup."""

    bundle: BenchedBundle
    setup: RunSetup
    budget: str
    """Memory budget as given on the command line"""
    test: str
    n_tokens: int
    """Timed tokens of one repetition"""
    depth: int
    tokens_per_second_all: tuple[float, ...]
    timed: PhaseCounters
    """Counters of the timed tokens, all repetitions together"""
    peak_rss_bytes: int
    peak_rss_of: str
    """row: while this row ran; process: since the process began, where the peak cannot be reset"""
    cache: CacheState
    """cold: expert cache and page cache emptied before every repetition; warm: after one run that
    is not counted"""
    tokens_from: str
    """text or random"""
    load_average: float
    """Load of the machine over the last minute, when the row was done; our own threads included"""

    @property
    def tokens_per_second(self) -> float:
        """Mean over the repetitions."""
        return statistics.mean(self.tokens_per_second_all)

    @property
    def tokens_per_second_sd(self) -> float:
        """Sample standard deviation over the repetitions; 0 for one."""
        rates = self.tokens_per_second_all
        return statistics.stdev(rates) if len(rates) > 1 else 0.0

    @property
    def stall_share(self) -> float:
        """Share of the time that the computation waited for a read, 0 to 1."""
        return self.timed.stall_seconds / sum(
            self.n_tokens / rate for rate in self.tokens_per_second_all
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchReport:
    """Rows of all tests, in the order in which they ran."""

    bundle: str
    repetitions: int
    seed: int
    load_average: float
    """Load of the machine over the last minute, before the first row"""
    rows: tuple[BenchRow, ...]
    seconds: float
