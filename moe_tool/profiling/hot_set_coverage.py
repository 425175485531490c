"""Coverage of hot sets of several sizes: on held-out text, across domains, and at best."""

from collections.abc import Sequence

import numpy as np

from moe_tool.artifacts.expert_statistics import RoutingCounts
from moe_tool.artifacts.routing_report import (
    DomainPair,
    DomainTransfer,
    HotSetCoverage,
    Shares,
    mean_of_known,
)
from moe_tool.profiling.coverage import hottest, share_answered

HOT_PERCENTS = (10, 25, 50)
"""Sizes of hot sets in percent of a layer's experts."""


def hot_set_coverages(
    in_sample: RoutingCounts,
    held_out: RoutingCounts,
    sequence_loads: np.ndarray,
    domains: Sequence[str],
) -> tuple[HotSetCoverage, ...]:
    """Return one layer's coverage for each size in HOT_PERCENTS.

    Args:
        in_sample: counts that choose the sets.
        held_out: counts to be covered; both may be of no tokens, in all or in one domain.
        sequence_loads: [n, E] int64, loads of each held-out sequence; n may be 0.
        domains: D labels, in the order of both `domain_load`.
    """
    n_experts = len(in_sample.load)
    coverages = []
    for percent in HOT_PERCENTS:
        n_hot = max(1, n_experts * percent // 100)
        hot = hottest(in_sample.load, n_hot=n_hot)
        shares = _shares_between(in_sample.domain_load, held_out.domain_load, n_hot)
        coverages.append(
            HotSetCoverage(
                percent=percent,
                n_hot=n_hot,
                by_chance=n_hot / n_experts,
                in_sample=share_answered(in_sample.load, hot),
                held_out=share_answered(held_out.load, hot),
                best_per_sequence=_best_per_sequence(sequence_loads, n_hot),
                domains=domain_transfer(shares, domains),
            )
        )
    return tuple(coverages)


def loads_by_sequence(top_k_index: np.ndarray, n_experts: int) -> np.ndarray:
    """Return how often each sequence uses each expert, [n, E] int64, from [n, S, K] experts."""
    n_sequences = len(top_k_index)
    first_cell = np.arange(n_sequences)[:, None, None] * n_experts
    cells = (top_k_index.astype(np.int64) + first_cell).reshape(-1)
    return np.bincount(cells, minlength=n_sequences * n_experts).reshape(n_sequences, n_experts)


def mean_hot_sets(
    layers: Sequence[Sequence[HotSetCoverage]], domains: Sequence[str]
) -> tuple[HotSetCoverage, ...]:
    """Return the mean over one or more layers by size; the worst pair of domains is that of the
    mean."""
    means = []
    for rows in zip(*layers, strict=True):
        matrices = [row.domains.shares for row in rows if row.domains is not None]
        shares = tuple(
            tuple(mean_of_known(entries) for entries in zip(*of_domain, strict=True))
            for of_domain in zip(*matrices, strict=True)
        )
        means.append(
            HotSetCoverage(
                percent=rows[0].percent,
                n_hot=rows[0].n_hot,
                by_chance=rows[0].by_chance,
                in_sample=mean_of_known([row.in_sample for row in rows]),
                held_out=mean_of_known([row.held_out for row in rows]),
                best_per_sequence=mean_of_known([row.best_per_sequence for row in rows]),
                domains=domain_transfer(shares, domains),
            )
        )
    return tuple(means)


def domain_transfer(shares: tuple[Shares, ...], domains: Sequence[str]) -> DomainTransfer | None:
    """Return [D, D] shares with their means; None with fewer than two domains."""
    if len(domains) < 2:
        return None
    pairs = [
        DomainPair(hot_in=domains[row], asked_of=domains[column], share=share)
        for row, of_row in enumerate(shares)
        for column, share in enumerate(of_row)
        if row != column and share is not None
    ]
    return DomainTransfer(
        shares=shares,
        same_domain=mean_of_known([shares[row][row] for row in range(len(domains))]),
        other_domain=mean_of_known([pair.share for pair in pairs]),
        worst=min(pairs, key=lambda pair: pair.share, default=None),
    )


def _shares_between(fitted: np.ndarray, asked: np.ndarray, n_hot: int) -> tuple[Shares, ...]:
    """Return [D, D] shares from [D, E] loads in-sample and held-out."""
    rows: list[Shares] = []
    for load in fitted:
        hot = hottest(load, n_hot=n_hot)
        rows.append(tuple(share_answered(other, hot) if load.any() else None for other in asked))
    return tuple(rows)


def _best_per_sequence(loads: np.ndarray, n_hot: int) -> float | None:
    used = loads[loads.sum(axis=1) > 0]
    if not len(used):
        return None
    best = np.sort(used, axis=1)[:, used.shape[1] - n_hot :].sum(axis=1)
    return float((best / used.sum(axis=1)).mean())
