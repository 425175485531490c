"""Evaluation results: figures with their intervals, rows and reports."""

from dataclasses import dataclass
from typing import Any, Literal

from moe_tool.artifacts.json_fields import Spread
from moe_tool.artifacts.run_result import RunSetup
from moe_tool.artifacts.run_stats import PhaseCounters

Verdict = Literal["beaten", "within intervals", "beats priced"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate(Spread):
    """A figure with its 95 % interval."""

    value: float
    ci95: tuple[float, float] | None
    """Bootstrap interval over sequences; None with a single sequence"""

    @property
    def low(self) -> float:
        """Lower end; the value itself without an interval."""
        return self.value if self.ci95 is None else self.ci95[0]

    @property
    def high(self) -> float:
        """Upper end; the value itself without an interval."""
        return self.value if self.ci95 is None else self.ci95[1]

    def keys_of(self, name: str, /) -> dict[str, Any]:
        """Return the value under its name, and the interval beside it."""
        return {name: self.value, f"{name}_ci95": self.ci95}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures(Spread):
    """Quality and bytes read of a policy."""

    tokens: int
    """Scored predictions"""
    perplexity: Estimate
    perplexity_exact: Estimate
    perplexity_source: Estimate | None
    """Perplexity of the checkpoint itself; None without a reference"""
    kl_mean: Estimate
    """KL(exact || policy), nats per token"""
    kl_p99: Estimate
    top1_agreement: Estimate
    kl_source_mean: Estimate | None
    """KL(checkpoint || policy); None without a reference"""
    kl_source_exact_mean: Estimate | None
    """KL(checkpoint || exact): cost of the bundle's precision alone"""
    hit_rate: Estimate
    bytes_read_per_token: Estimate
    substitutions_per_token: float
    replica_answers_per_token: float
    drops_per_token: float
    expected_kl: float | None
    """Nats per token expected from the bundle's prices; None if it has none"""
    exact_fallback_share: float
    """Share of tokens answered exactly to keep a calibrated limit"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyRow:
    """One row of the table."""

    policy: str
    figures: Figures
    domains: dict[str, Figures]


@dataclass(frozen=True, slots=True, kw_only=True)
class AtNoMoreBytes:
    """One policy beside the setting of `priced` that reads most bytes without reading more."""

    policy: str
    priced: str
    ratio: float | None
    """KL of `priced` over the policy's; None if the policy's is 0"""
    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationReport:
    """Results of the requested policy, and of its controls if they were requested."""

    bundle: str
    setup: RunSetup
    gates: bool
    seed: int
    sequences: int
    seq_len: int
    rows: tuple[PolicyRow, ...]
    """Every policy that ran, in the order of the table"""
    at_no_more_bytes: tuple[AtNoMoreBytes, ...]
    """Comparison of every other lossy policy with `priced`; empty without controls or prices"""
    dominating: tuple[tuple[str, str], ...]
    """(policy, setting of `priced`): both fewer bytes and a lower KL, beyond the intervals"""
    skipped: dict[str, str]
    """Controls that this bundle cannot run -> why"""
    sparsity: float
    """Share of experts' channels that was skipped"""
    whole_bytes_per_token: float
    """Bytes that misses would have read, had every channel been read"""
    seconds: float
    peak_rss_bytes: int

    @property
    def figures(self) -> Figures:
        """Figures of the requested policy."""
        return self.main().figures

    @property
    def domains(self) -> dict[str, Figures]:
        """Figures of the requested policy, by domain of the text."""
        return self.main().domains

    def main(self) -> PolicyRow:
        """Return the row of the requested policy."""
        return next(row for row in self.rows if row.policy == self.setup.policy)

    def by_policy(self) -> dict[str, Figures]:
        """Return the figures of all rows by policy."""
        return {row.policy: row.figures for row in self.rows}


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricRow:
    """One figure of one task or group of lm_eval."""

    task: str
    version: str
    filter: str
    shots: int | None
    samples: int | None
    """Documents; None for a group"""
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HarnessReport:
    """Metrics of lm_eval's tasks, and their cost. Rates cover decoding alone."""

    bundle: str
    rows: tuple[MetricRow, ...]
    setup: RunSetup
    lossy: bool
    decode_context: bool
    limit: int | None
    lm_eval_version: str
    cut_contexts: int
    """Requests whose context was too long and was cut at the beginning"""
    prompt: PhaseCounters
    """Counters of prompts, which every policy answers exactly"""
    decode: PhaseCounters
    """Counters of decoding under the policy"""
    seconds: float
    peak_rss_bytes: int
