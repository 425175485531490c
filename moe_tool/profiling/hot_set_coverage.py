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
from moe_tool.profiling.hot_set import hottest, share_answered

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
    return tuple(
        _coverage(percent, in_sample, held_out, sequence_loads, domains) for percent in HOT_PERCENTS
    )


def loads_by_sequence(top_k_index: np.ndarray, n_experts: int) -> np.ndarray:
    """Return how often each sequence uses each expert.

    Args:
        top_k_index: [n, S, K] integers below `n_experts`.
        n_experts: E.

    Returns:
        [n, E] int64.
    """
    n_sequences = len(top_k_index)
    first_cell = np.arange(n_sequences)[:, None, None] * n_experts
    cells = (top_k_index.astype(np.int64) + first_cell).reshape(-1)
    return np.bincount(cells, minlength=n_sequences * n_experts).reshape(n_sequences, n_experts)


def mean_hot_sets(
    layers: Sequence[Sequence[HotSetCoverage]], domains: Sequence[str]
) -> tuple[HotSetCoverage, ...]:
    """Return the mean over layers by size; the worst pair of domains is that of the mean.

    Args:
        layers: results of `hot_set_coverages`, at least one.
        domains: D labels.
    """
    return tuple(_mean(rows, domains) for rows in zip(*layers, strict=True))


def domain_transfer(shares: tuple[Shares, ...], domains: Sequence[str]) -> DomainTransfer | None:
    """Return a matrix of shares with its means, None with fewer than two domains.

    Args:
        shares: [D, D], None where either domain is without tokens.
        domains: D labels.
    """
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


def _coverage(
    percent: int,
    in_sample: RoutingCounts,
    held_out: RoutingCounts,
    sequence_loads: np.ndarray,
    domains: Sequence[str],
) -> HotSetCoverage:
    n_experts = len(in_sample.load)
    n_hot = max(1, n_experts * percent // 100)
    hot = hottest(in_sample.load, n_hot=n_hot)
    return HotSetCoverage(
        percent=percent,
        n_hot=n_hot,
        by_chance=n_hot / n_experts,
        in_sample=share_answered(in_sample.load, hot),
        held_out=share_answered(held_out.load, hot),
        best_per_sequence=_best_per_sequence(sequence_loads, n_hot),
        domains=domain_transfer(
            _shares_between(in_sample.domain_load, held_out.domain_load, n_hot), domains
        ),
    )


def _shares_between(fitted: np.ndarray, asked: np.ndarray, n_hot: int) -> tuple[Shares, ...]:
    """Return [D, D] shares from [D, E] loads in-sample and held-out."""
    rows: list[Shares] = []
    for load in fitted:
        if load.any():
            hot = hottest(load, n_hot=n_hot)
            rows.append(tuple(share_answered(other, hot) for other in asked))
        else:
            rows.append((None,) * len(asked))
    return tuple(rows)


def _best_per_sequence(loads: np.ndarray, n_hot: int) -> float | None:
    used = loads[loads.sum(axis=1) > 0]
    if not len(used):
        return None
    best = np.sort(used, axis=1)[:, used.shape[1] - n_hot :].sum(axis=1)
    return float((best / used.sum(axis=1)).mean())


def _mean(rows: Sequence[HotSetCoverage], domains: Sequence[str]) -> HotSetCoverage:
    first = rows[0]
    return HotSetCoverage(
        percent=first.percent,
        n_hot=first.n_hot,
        by_chance=first.by_chance,
        in_sample=mean_of_known([row.in_sample for row in rows]),
        held_out=mean_of_known([row.held_out for row in rows]),
        best_per_sequence=mean_of_known([row.best_per_sequence for row in rows]),
        domains=domain_transfer(
            _mean_shares([row.domains.shares for row in rows if row.domains is not None]), domains
        ),
    )


def _mean_shares(matrices: Sequence[tuple[Shares, ...]]) -> tuple[Shares, ...]:
    """Return the entrywise mean of matrices of one shape."""
    return tuple(
        tuple(mean_of_known(entries) for entries in zip(*rows, strict=True))
        for rows in zip(*matrices, strict=True)
    )
