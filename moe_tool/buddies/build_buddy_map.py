"""Build a buddy map: each layer's experts ranked as substitutes for each other."""

import numpy as np

from moe_tool import __version__
from moe_tool.artifacts.buddy_map import Buddy, BuddyMap, LayerBuddies, Similarity
from moe_tool.artifacts.expert_statistics import ExpertStatistics
from moe_tool.buddies.clusters import cluster_experts
from moe_tool.buddies.measures import CUMULATIVE_MASS, MEASURES, frequent_companions
from moe_tool.errors import UsageError
from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.policies.misses.gates import token_activating_entropy

ENTROPY_PERCENTILE = 15.0
"""BuddyMoE's p (10..20): tokens with entropy below this percentile are answered exactly."""


def build_buddy_map(
    profile: ProfileReader, *, k: int, by: Similarity = "output", mass: float = CUMULATIVE_MASS
) -> BuddyMap:
    """Return for every expert its k best substitutes by one measure, best first.

    The measure only ranks; scale and price always come from the regression on the expert's output.
    A scale may be negative. With `coactivation` a list may be shorter than k: it ends where
    BuddyMoE's does.

    Args:
        k: substitutes per expert, 1..E-1.
        mass: cumulative frequency at which a list by `coactivation` ends, 0..1.

    Raises:
        UsageError: k is not in 1..E-1.
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
    tokens = profile.tokens
    in_sample = np.repeat(~tokens.held_out, tokens.ids.shape[1])  # [T]
    layers = []
    for layer in profile.layers:
        statistics = profile.statistics(layer)
        weights = profile.trace(layer).top_k_weight[in_sample]
        similarity = MEASURES[by](statistics)
        layers.append(
            LayerBuddies(
                layer=layer,
                entropy_threshold=entropy_threshold(weights),
                buddies=tuple(
                    tuple(
                        _buddy(statistics, similarity, expert, other)
                        for other in _ranked(similarity[expert], expert, k=k, by=by, mass=mass)
                    )
                    for expert in range(n_experts)
                ),
                clusters=cluster_experts(similarity),
            )
        )
    return BuddyMap(
        tool_version=__version__,
        identity=profile.header.identity,
        profile_sha256=profile.sha256,
        by=by,
        k=k,
        layers=tuple(layers),
    )


def entropy_threshold(weights: np.ndarray) -> float:
    """Return BuddyMoE's tau: 15th percentile of the entropy of [T, K] weights; 0 if T is 0."""
    if len(weights) == 0:
        return 0.0
    return float(np.percentile(token_activating_entropy(weights), ENTROPY_PERCENTILE))


def _ranked(
    similarity: np.ndarray, expert: int, *, k: int, by: Similarity, mass: float
) -> list[int]:
    """Return the substitutes of one expert from its [E] row of similarities, ties by lower id."""
    if by == "coactivation":
        return frequent_companions(similarity, k=k, mass=mass)
    order = np.argsort(-similarity, kind="stable")
    return [int(other) for other in order if other != expert][:k]


def _buddy(statistics: ExpertStatistics, similarity: np.ndarray, expert: int, other: int) -> Buddy:
    return Buddy(
        expert=other,
        similarity=float(similarity[expert, other]),
        scale=float(statistics.probe.scale[expert, other]),
        price=float(statistics.probe.eps_buddy[expert, other]),
        price_held_out=float(statistics.eps_buddy_transferred[expert, other]),
    )
