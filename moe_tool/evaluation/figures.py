"""Figures of an evaluation with their intervals, from measurements by token."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moe_tool.artifacts.evaluation_report import Estimate, Figures, PolicyRow
from moe_tool.evaluation.bootstrap import bootstrap_interval
from moe_tool.evaluation.stepwise import TokenCosts
from moe_tool.text.sequences import TokenSequences

_Statistic = Callable[[np.ndarray], np.ndarray]
"""Function [R, N, ...] -> [R] that gives the figure of each resample"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Measurements of one policy on N sequences with P scored predictions each.

    KL is 0 by definition if the policy is not lossy.
    """

    kl: np.ndarray
    """[N, P] float64: KL(exact || policy) in nats"""
    agrees: np.ndarray
    """[N, P] bool: whether the likeliest token is that of exact"""
    nll: np.ndarray
    """[N, P] float64: negative log-likelihood of the text under the policy, nats"""
    nll_exact: np.ndarray
    """[N, P] float64: negative log-likelihood under exact"""
    kl_source: np.ndarray | None
    """[N, P] float64: KL(checkpoint || policy); None without a reference"""
    kl_source_exact: np.ndarray | None
    """[N, P] float64: KL(checkpoint || exact); None without a reference"""
    nll_source: np.ndarray | None
    """[N, P] float64: negative log-likelihood under the checkpoint; None without a reference"""
    costs: TokenCosts
    """Costs of each prediction, [N, P] each"""


def summarize(measured: Measured, rows: np.ndarray, *, seed: int) -> Figures:
    """Return the figures of some of the sequences.

    Args:
        measured: one policy's measurements.
        rows: [N] bool: the sequences to include.
        seed: seed of the bootstrap.
    """
    costs = measured.costs

    def estimate(values: np.ndarray, statistic: _Statistic = means) -> Estimate:
        ci95 = bootstrap_interval(values, statistic, seed=seed)
        return Estimate(value=float(statistic(values[None])[0]), ci95=ci95)

    def if_known(values: np.ndarray | None, statistic: _Statistic = means) -> Estimate | None:
        return None if values is None else estimate(values[rows], statistic)

    accesses = np.stack([costs.hits[rows].sum(axis=1), costs.accesses[rows].sum(axis=1)], axis=1)
    return Figures(
        tokens=int(measured.nll[rows].size),
        perplexity=estimate(measured.nll[rows], perplexities),
        perplexity_exact=estimate(measured.nll_exact[rows], perplexities),
        perplexity_source=if_known(measured.nll_source, perplexities),
        kl_mean=estimate(measured.kl[rows]),
        kl_p99=estimate(measured.kl[rows], _p99),
        top1_agreement=estimate(measured.agrees[rows]),
        kl_source_mean=if_known(measured.kl_source),
        kl_source_exact_mean=if_known(measured.kl_source_exact),
        hit_rate=estimate(accesses, _ratio),
        bytes_read_per_token=estimate(costs.bytes_read[rows]),
        substitutions_per_token=float(costs.substitutions[rows].mean()),
        replica_answers_per_token=float(costs.replica_answers[rows].mean()),
        drops_per_token=float(costs.drops[rows].mean()),
        expected_kl=None if np.isnan(costs.expected).any() else float(costs.expected[rows].mean()),
        exact_fallback_share=float(costs.exact_fallbacks[rows].mean()),
    )


def policy_row(policy: str, measured: Measured, text: TokenSequences, *, seed: int) -> PolicyRow:
    """Return the figures of all sequences, and of those of each domain."""
    everything = np.ones(len(text.ids), dtype=bool)
    return PolicyRow(
        policy=policy,
        figures=summarize(measured, everything, seed=seed),
        domains={
            domain: summarize(measured, text.domain == index, seed=seed)
            for index, domain in enumerate(text.domains)
        },
    )


def means(values: np.ndarray) -> np.ndarray:
    """Return the mean of each resample, [R], from [R, N, ...]."""
    result: np.ndarray = values.reshape(len(values), -1).mean(axis=1)
    return result


def perplexities(nll: np.ndarray) -> np.ndarray:
    """Return exp of the mean nats of each resample, [R], from [R, N, ...]; inf on overflow."""
    with np.errstate(over="ignore"):
        result: np.ndarray = np.exp(means(nll))
    return result


def _p99(values: np.ndarray) -> np.ndarray:
    result: np.ndarray = np.percentile(values.reshape(len(values), -1), 99, axis=1)
    return result


def _ratio(sums: np.ndarray) -> np.ndarray:
    """Return hits over accesses, [R], from sums [R, N, 2]; 1 without accesses."""
    hits, accesses = sums.sum(axis=1).T
    return np.where(accesses > 0, hits / np.maximum(accesses, 1), 1.0)
