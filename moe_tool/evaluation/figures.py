"""The figures of an evaluation, with their intervals, from what was measured token by token."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moe_tool.evaluation.bootstrap import bootstrap_interval
from moe_tool.evaluation.perplexity import perplexity
from moe_tool.evaluation.stepwise import TokenCosts

Interval = tuple[float, float] | None
"""95 %, by bootstrap over sequences; None where there is only one sequence"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One policy on N sequences, P scored predictions each. A policy that is not lossy has kl 0 by
    definition."""

    kl: np.ndarray
    """[N, P] float64: KL(exact || policy) in nats"""
    agrees: np.ndarray
    """[N, P] bool: same first choice as exact"""
    nll: np.ndarray
    """[N, P] float64: nats that the text costs under the policy"""
    nll_exact: np.ndarray
    """[N, P] float64: the same under exact"""
    kl_source: np.ndarray | None
    """[N, P] float64: KL(checkpoint || policy); None without a reference"""
    kl_source_exact: np.ndarray | None
    """[N, P] float64: KL(checkpoint || exact); None without a reference"""
    nll_source: np.ndarray | None
    """[N, P] float64: nats that the text costs under the checkpoint; None without a reference"""
    costs: TokenCosts
    """[N, P] each"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What a policy costs, in quality and in bytes."""

    tokens: int
    """Scored predictions"""
    perplexity: float
    perplexity_ci95: Interval
    perplexity_exact: float
    perplexity_exact_ci95: Interval
    perplexity_source: float | None
    """Of the checkpoint itself; None without a reference"""
    perplexity_source_ci95: Interval
    kl_mean: float
    """KL(exact || policy), nats per token"""
    kl_mean_ci95: Interval
    kl_p99: float
    kl_p99_ci95: Interval
    top1_agreement: float
    top1_agreement_ci95: Interval
    kl_source_mean: float | None
    """KL(checkpoint || policy); None without a reference"""
    kl_source_mean_ci95: Interval
    kl_source_exact_mean: float | None
    """KL(checkpoint || exact): what the bundle's precision costs by itself"""
    kl_source_exact_mean_ci95: Interval
    hit_rate: float
    hit_rate_ci95: Interval
    bytes_read_per_token: float
    bytes_read_per_token_ci95: Interval
    substitutions_per_token: float
    lowered_per_token: float
    drops_per_token: float
    expected_kl: float | None
    """What the price list expects, nats per token; None where the bundle has none"""
    retreated_share: float
    """Tokens that were answered exactly to keep a calibrated limit"""


def summarize(measured: Measured, rows: np.ndarray, *, seed: int) -> Figures:
    """Return the figures of some of the sequences.

    Args:
        measured: of one policy.
        rows: [N] bool: the sequences that count.
        seed: of the bootstrap.
    """
    costs = measured.costs

    def estimate(
        values: np.ndarray, statistic: Callable[[np.ndarray], float]
    ) -> tuple[float, Interval]:
        return statistic(values), bootstrap_interval(values, statistic, seed=seed)

    def optional(
        values: np.ndarray | None, statistic: Callable[[np.ndarray], float] = _mean
    ) -> tuple[float | None, Interval]:
        return (None, None) if values is None else estimate(values[rows], statistic)

    ppl, ppl_ci = estimate(measured.nll[rows], perplexity)
    ppl_exact, ppl_exact_ci = estimate(measured.nll_exact[rows], perplexity)
    ppl_source, ppl_source_ci = optional(measured.nll_source, perplexity)
    kl, kl_ci = estimate(measured.kl[rows], _mean)
    p99, p99_ci = estimate(measured.kl[rows], _p99)
    top1, top1_ci = estimate(measured.agrees[rows], _mean)
    source, source_ci = optional(measured.kl_source)
    source_exact, source_exact_ci = optional(measured.kl_source_exact)
    accesses = np.stack([costs.hits[rows].sum(axis=1), costs.accesses[rows].sum(axis=1)], axis=1)
    hit_rate, hit_rate_ci = estimate(accesses, _ratio)
    n_bytes, n_bytes_ci = estimate(costs.bytes_read[rows], _mean)
    return Figures(
        tokens=int(measured.nll[rows].size),
        perplexity=ppl,
        perplexity_ci95=ppl_ci,
        perplexity_exact=ppl_exact,
        perplexity_exact_ci95=ppl_exact_ci,
        perplexity_source=ppl_source,
        perplexity_source_ci95=ppl_source_ci,
        kl_mean=kl,
        kl_mean_ci95=kl_ci,
        kl_p99=p99,
        kl_p99_ci95=p99_ci,
        top1_agreement=top1,
        top1_agreement_ci95=top1_ci,
        kl_source_mean=source,
        kl_source_mean_ci95=source_ci,
        kl_source_exact_mean=source_exact,
        kl_source_exact_mean_ci95=source_exact_ci,
        hit_rate=hit_rate,
        hit_rate_ci95=hit_rate_ci,
        bytes_read_per_token=n_bytes,
        bytes_read_per_token_ci95=n_bytes_ci,
        substitutions_per_token=float(costs.substitutions[rows].mean()),
        lowered_per_token=float(costs.lowered[rows].mean()),
        expected_kl=None if np.isnan(costs.expected).any() else _mean(costs.expected[rows]),
        retreated_share=float(costs.retreated[rows].mean()),
        drops_per_token=float(costs.drops[rows].mean()),
    )


def _mean(values: np.ndarray) -> float:
    return float(values.mean())


def _p99(values: np.ndarray) -> float:
    return float(np.percentile(values, 99))


def _ratio(sums: np.ndarray) -> float:
    """Hits over accesses; 1 when there were none. sums: [N, 2]."""
    hits, accesses = sums.sum(axis=0)
    return float(hits / accesses) if accesses else 1.0
