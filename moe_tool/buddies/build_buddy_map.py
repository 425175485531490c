"""Build a buddy map: each layer's experts ranked as substitutes for each other."""

import numpy as np

from moe_tool import __version__
from moe_tool.artifacts.buddy_map import Buddy, BuddyMap, LayerBuddies, Similarity
from moe_tool.artifacts.expert_statistics import ExpertStatistics, ProbeStatistics
from moe_tool.buddies.clusters import cluster_experts
from moe_tool.buddies.list_rules import ListRules
from moe_tool.buddies.measures import (
    MEASURES,
    conditional_frequency,
    frequent_companions,
    weighted_coactivation,
)
from moe_tool.errors import UsageError
from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.policies.misses.gates import token_activating_entropy

ENTROPY_PERCENTILE = 15.0
"""BuddyMoE's p (10..20): tokens with entropy below this percentile are answered exactly."""


_LEAST_SCALE = 1e-3
"""Least scale whose square is not lost in the rounding of 1 - eps^2"""
DEFAULT_RULES = ListRules()
"""Rules by default: BuddyMoE's for lists, and our scale"""


def build_buddy_map(
    profile: ProfileReader,
    *,
    k: int,
    by: Similarity = "output",
    rules: ListRules = DEFAULT_RULES,
) -> BuddyMap:
    """Return for every expert its k best substitutes by one measure, best first.

    The measure only ranks; scale and price come from the regression on the expert's output, unless
    the rules ask for a scale of 1. A fitted scale may be negative. With
    `coactivation` a list may be shorter than k: it ends where BuddyMoE's does.

    Args:
        k: substitutes per expert, 1..E-1.

    Raises:
        UsageError: k is not in 1..E-1, or the rules do not apply to `by` or name a layer that the
            profile does not have.
        CorruptArtifactError, StorageError: the profile cannot be read.
    """
    n_experts = profile.header.shape.experts
    if not 1 <= k <= n_experts - 1:
        raise UsageError(
            f"--k {k}: a layer of {profile.header.identity.name} has {n_experts} experts, "
            f"so {n_experts - 1} possible stand-ins for each",
            hint=f"give --k 1 to {n_experts - 1}"
            if n_experts > 1
            else "a model with one expert per layer has no stand-ins",
        )
    rules.require_coactivation(by)
    if unknown := sorted(set(rules.alpha_by_layer) - set(profile.layers)):
        raise UsageError(
            f"--alpha-by-layer: layer {unknown[0]} has no experts",
            hint=f"MoE layers are {', '.join(map(str, profile.layers))}",
        )
    layers = tuple(
        _layer_buddies(profile, layer, k=k, by=by, rules=rules) for layer in profile.layers
    )
    return BuddyMap(
        tool_version=__version__,
        identity=profile.header.identity,
        profile_sha256=profile.sha256,
        by=by,
        k=k,
        rules=rules.record(),
        layers=layers,
    )


def _layer_buddies(
    profile: ProfileReader, layer: int, *, k: int, by: Similarity, rules: ListRules
) -> LayerBuddies:
    statistics, tokens = profile.statistics(layer), profile.tokens
    in_sample = np.repeat(~tokens.held_out, tokens.ids.shape[1])  # [T]
    weights = profile.trace(layer).top_k_weight[in_sample]
    is_counted = by == "coactivation"
    similarity = _frequency(profile, layer, rules=rules) if is_counted else MEASURES[by](statistics)
    mass = rules.alpha_of(layer)
    return LayerBuddies(
        layer=layer,
        entropy_threshold=entropy_threshold(weights),
        entropy_quantiles=entropy_quantiles(weights),
        buddies=tuple(
            tuple(
                _buddy(statistics, similarity, expert, other, rules=rules)
                for other in _ranked(similarity[expert], expert, k=k, by=by, mass=mass)
            )
            for expert in range(len(similarity))
        ),
        clusters=cluster_experts(similarity),
    )


def entropy_threshold(weights: np.ndarray) -> float:
    """Return BuddyMoE's tau: 15th percentile of the entropy of [T, K] weights; 0 if T is 0."""
    if len(weights) == 0:
        return 0.0
    return float(np.percentile(token_activating_entropy(weights), ENTROPY_PERCENTILE))


def entropy_quantiles(weights: np.ndarray) -> tuple[float, ...]:
    """Return the entropy of [T, K] weights at 0, 1, ..., 100 %; nothing if T is 0."""
    if len(weights) == 0:
        return ()
    found = np.percentile(token_activating_entropy(weights), np.arange(101))
    return tuple(float(each) for each in np.maximum.accumulate(found))


def _frequency(profile: ProfileReader, layer: int, *, rules: ListRules) -> np.ndarray:
    """Return the co-activation frequencies of a layer by the rules, [E, E] float64."""
    if not rules.counts_anew:
        counts = profile.statistics(layer).in_sample.coactivation
        return conditional_frequency(counts, rules.smoothing)
    trace, tokens = profile.trace(layer), profile.tokens
    seq_len = tokens.ids.shape[1]
    in_sample = np.repeat(~tokens.held_out, seq_len)  # [T]
    is_warm_up = np.tile(np.arange(seq_len) < rules.warm_up, len(tokens.ids))[in_sample]
    index = trace.top_k_index[in_sample]
    share = np.ones(index.shape)
    if rules.weighted:
        gates = np.maximum(trace.top_k_weight[in_sample].astype(np.float64), 0.0)
        total = gates.sum(axis=1, keepdims=True)
        share = np.divide(gates, total, out=np.zeros_like(gates), where=total > 0)
    token_weight = np.where(is_warm_up, rules.warm_up_weight, 1.0)
    counts = weighted_coactivation(index, share, token_weight, profile.header.shape.experts)
    return conditional_frequency(counts, rules.smoothing)


def _ranked(
    similarity: np.ndarray, expert: int, *, k: int, by: Similarity, mass: float
) -> list[int]:
    """Return the substitutes of one expert from its [E] row of similarities, ties by lower id."""
    if by == "coactivation":
        return frequent_companions(similarity, k=k, mass=mass)
    order = np.argsort(-similarity, kind="stable")
    return [int(other) for other in order if other != expert][:k]


def _buddy(
    statistics: ExpertStatistics,
    similarity: np.ndarray,
    expert: int,
    other: int,
    *,
    rules: ListRules,
) -> Buddy:
    scale = float(statistics.probe.scale[expert, other])
    price = float(statistics.probe.eps_buddy[expert, other])
    held_out = float(statistics.eps_buddy_transferred[expert, other])
    if rules.scale == "none":
        scale = 1.0
        price = _unscaled_price(statistics.probe, expert, other)
        held_out = _unscaled_price(statistics.probe_held_out, expert, other)
    return Buddy(
        expert=other,
        similarity=float(similarity[expert, other]),
        scale=scale,
        price=price,
        price_held_out=held_out,
    )


def _unscaled_price(probe: ProbeStatistics, expert: int, other: int) -> float:
    """Return the relative error of one expert's output as it is in place of another's.

    With ||E_i - a E_j||^2 = eps^2 ||E_i||^2 at the best a, the error of E_j itself is
    eps^2 + (1 - a)^2 r, where r = ||E_j||^2 / ||E_i||^2 = (1 - eps^2) / a^2. For a near 0, which
    says nothing about r, it is the ratio of the experts' norms on their own tokens.
    """
    a, eps = float(probe.scale[expert, other]), float(probe.eps_buddy[expert, other])
    norm, other_norm = float(probe.output_norm[expert]), float(probe.output_norm[other])
    if abs(a) >= _LEAST_SCALE:
        ratio = max(1 - eps**2, 0.0) / a**2
    else:
        ratio = (other_norm / norm) ** 2 if norm > 0 else 0.0
    return float(np.sqrt(eps**2 + (1 - a) ** 2 * ratio))
