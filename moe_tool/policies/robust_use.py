"""Use of experts that residents are chosen by: between a profile's mean and its worst domain."""

from collections.abc import Sequence

import numpy as np

from moe_tool.artifacts.router_trace import mean_squared_gates
from moe_tool.policies.cheapest_residents import ExpertUse


def robust_use(mean: ExpertUse, by_domain: Sequence[ExpertUse], share: float) -> ExpertUse:
    """Return one layer's use, (1 - share) * mean + share * worst case.

    The worst case is, expert by expert, the largest use in any domain and in a made-up one that
    uses every expert alike, so that none is forgotten. It is the use of no text: prices are those
    of the mean.

    Args:
        mean: use over all tokens of the profile.
        by_domain: use over the tokens of each of its domains.
        share: 0, for the mean itself, to 1.
    """
    if share == 0:
        return mean
    return ExpertUse(
        squared_gate=_mixed(mean.squared_gate, [each.squared_gate for each in by_domain], share),
        load=_mixed(mean.load, [each.load for each in by_domain], share),
    )


def use_by_domain(
    index: np.ndarray, weight: np.ndarray, domain: np.ndarray, n_experts: int
) -> tuple[ExpertUse, ...]:
    """Return one layer's use over the tokens of each domain that has any, by ascending number.

    Args:
        index: [T, K] experts.
        weight: [T, K] gate weights.
        domain: [T] number of each token's domain.
    """
    found = []
    for number in np.unique(domain):
        is_here = domain == number
        chosen = index[is_here].astype(np.int64)
        counts = np.bincount(chosen.reshape(-1), minlength=n_experts)
        found.append(
            ExpertUse(
                squared_gate=mean_squared_gates(chosen, weight[is_here], n_experts),
                load=np.minimum(counts / len(chosen), 1.0),  # an expert can be chosen twice
            )
        )
    return tuple(found)


def mean_use(by_domain: Sequence[ExpertUse], n_tokens: Sequence[int]) -> ExpertUse:
    """Return one layer's mean use over domains of `n_tokens` tokens each."""
    return ExpertUse(
        squared_gate=np.average([each.squared_gate for each in by_domain], 0, n_tokens),
        load=np.average([each.load for each in by_domain], 0, n_tokens),
    )


def _mixed(mean: np.ndarray, by_domain: Sequence[np.ndarray], share: float) -> np.ndarray:
    alike = np.full_like(mean, mean.mean())
    worst = np.max([*by_domain, alike], axis=0)
    mixed: np.ndarray = (1 - share) * mean + share * worst
    return mixed
