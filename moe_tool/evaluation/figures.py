"""The figures of an evaluation, with their intervals, from what was measured token by token."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moe_tool.evaluation.bootstrap import bootstrap_interval
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
        values: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]
    ) -> tuple[float, Interval]:
        return float(statistic(values[None])[0]), bootstrap_interval(values, statistic, seed=seed)

    def optional(
        values: np.ndarray | None, statistic: Callable[[np.ndarray], np.ndarray] = means
    ) -> tuple[float | None, Interval]:
        return (None, None) if values is None else estimate(values[rows], statistic)

    ppl, ppl_ci = estimate(measured.nll[rows], perplexities)
    ppl_exact, ppl_exact_ci = estimate(measured.nll_exact[rows], perplexities)
    ppl_source, ppl_source_ci = optional(measured.nll_source, perplexities)
    kl, kl_ci = estimate(measured.kl[rows], means)
    p99, p99_ci = estimate(measured.kl[rows], _p99)
    top1, top1_ci = estimate(measured.agrees[rows], means)
    source, source_ci = optional(measured.kl_source)
    source_exact, source_exact_ci = optional(measured.kl_source_exact)
    accesses = np.stack([costs.hits[rows].sum(axis=1), costs.accesses[rows].sum(axis=1)], axis=1)
    hit_rate, hit_rate_ci = estimate(accesses, _ratio)
    n_bytes, n_bytes_ci = estimate(costs.bytes_read[rows], means)
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
        expected_kl=None if np.isnan(costs.expected).any() else float(costs.expected[rows].mean()),
        retreated_share=float(costs.retreated[rows].mean()),
        drops_per_token=float(costs.drops[rows].mean()),
    )


def means(values: np.ndarray) -> np.ndarray:
    """Return the mean of each resample, [R], from [R, N, ...]."""
    result: np.ndarray = values.reshape(len(values), -1).mean(axis=1)
    return result


def perplexities(nll: np.ndarray) -> np.ndarray:
    """Return exp of the mean nats of each resample, [R], from [R, N, ...]; inf where no float is
    large enough."""
    with np.errstate(over="ignore"):
        result: np.ndarray = np.exp(means(nll))
    return result


def _p99(values: np.ndarray) -> np.ndarray:
    result: np.ndarray = np.percentile(values.reshape(len(values), -1), 99, axis=1)
    return result


def _ratio(sums: np.ndarray) -> np.ndarray:
    """Hits over accesses; 1 where there were none. sums: [R, N, 2]."""
    hits, accesses = sums.sum(axis=1).T
    return np.where(accesses > 0, hits / np.maximum(accesses, 1), 1.0)
