"""Skew of a layer's expert use, and what its hot set answers in-sample and on held-out text."""

import numpy as np

from moe_tool.artifacts.expert_statistics import ExpertStatistics, RoutingCounts
from moe_tool.artifacts.routing_report import LayerCoverage
from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.policies.pin_rule import judge_pins

HOT_SHARE = 0.25
"""Size of the hot set as a share of a layer's experts."""


def hottest(load: np.ndarray, *, n_hot: int) -> np.ndarray:
    """Return the ids of the most used experts by [E] uses, hottest first, ties by lower id."""
    return np.argsort(-load, kind="stable")[:n_hot]


def share_answered(load: np.ndarray, chosen: np.ndarray) -> float | None:
    """Return the share of the [E] loads that falls on the chosen experts, None without loads."""
    total = load.sum()
    return float(load[chosen].sum() / total) if total else None


def layer_coverages(profile: ProfileReader) -> tuple[LayerCoverage, ...]:
    """Return the coverage of every layer of a profile, reading one layer at a time.

    Raises:
        CorruptArtifactError: a number in the profile is out of range.
    """
    return tuple(layer_coverage(layer, profile.statistics(layer)) for layer in profile.layers)


def layer_coverage(layer: int, statistics: ExpertStatistics) -> LayerCoverage:
    """Return the coverage of one layer; its in-sample or held-out counts may be of no tokens."""
    inside, outside = statistics.in_sample, statistics.held_out
    load, n_experts = inside.load, len(inside.load)
    hot = hottest(load, n_hot=max(1, int(n_experts * HOT_SHARE)))
    best = hottest(outside.load, n_hot=len(hot))
    coverage = share_answered(inside.load, hot) or 0.0
    coverage_held_out = share_answered(outside.load, hot)
    by_domain = tuple(share_answered(load, hot) for load in outside.domain_load)
    ruling = judge_pins(
        even=len(hot) / n_experts,
        in_sample=coverage,
        held_out=coverage_held_out,
        by_domain=by_domain,
    )
    return LayerCoverage(
        layer=layer,
        n_experts=n_experts,
        n_hot=len(hot),
        n_tokens=inside.n_tokens,
        n_tokens_held_out=outside.n_tokens,
        load_skew=float(load.max() / load.mean()) if load.any() else 0.0,
        entropy=_entropy(inside.load),
        never_used=int((inside.load == 0).sum()),
        locality=inside.same_as_previous,
        locality_by_chance=_locality_by_chance(inside),
        coverage=coverage,
        coverage_held_out=coverage_held_out,
        coverage_held_out_best=share_answered(outside.load, best),
        domain_coverage=tuple(share_answered(load, hot) for load in inside.domain_load),
        domain_coverage_held_out=by_domain,
        domain_distance=_largest_total_variation(inside.domain_load),
        pin=ruling.verdict,
    )


def _entropy(load: np.ndarray) -> float:
    """Return the entropy of [E] loads over log E; 0 where one expert has it all."""
    used = load[load > 0]
    if used.size <= 1:
        return 0.0
    share = used / used.sum()
    return float(np.clip(-(share * np.log(share)).sum() / np.log(len(load)), 0.0, 1.0))


def _locality_by_chance(counts: RoutingCounts) -> float:
    """Return sum of load_e^2 / (sum of load_e * T): two independent tokens sharing an expert."""
    uses = counts.load.sum()
    if uses == 0:
        return 0.0
    load = counts.load.astype(np.float64)
    return float((load * load).sum() / uses / counts.n_tokens)


def _largest_total_variation(domain_load: np.ndarray) -> float:
    """Return max over pairs of domains of half the sum of |p_e - q_e|, from [D, E] loads."""
    loads = domain_load[domain_load.sum(axis=1) > 0].astype(np.float64)
    if len(loads) < 2:
        return 0.0
    shares = loads / loads.sum(axis=1, keepdims=True)
    return float(np.abs(shares[:, None] - shares[None]).sum(axis=2).max() / 2)
