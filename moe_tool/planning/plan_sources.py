"""Inputs of planning from a profile, read once for any number of budgets."""

from dataclasses import dataclass

import numpy as np

from moe_tool.artifacts.access_trace import AccessTrace
from moe_tool.artifacts.expert_statistics import ExpertStatistics
from moe_tool.artifacts.router_trace import mean_squared_gates
from moe_tool.artifacts.skeleton_facts import SkeletonFacts
from moe_tool.errors import ArtifactVersionError
from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.planning.pinning import rank_experts
from moe_tool.policies.cheapest_residents import ExpertUse
from moe_tool.policies.robust_use import use_by_domain
from moe_tool.simulator.profile_trace import decode_trace, part_to_replay, prompt_trace
from moe_tool.simulator.replay import Replayer

_MAX_ACCESSES = 500_000
_MAX_SEARCH_ACCESSES = 200_000


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSources:
    """Data of a profile for planning."""

    profile: ProfileReader
    skeleton: SkeletonFacts
    statistics: dict[int, ExpertStatistics]
    use: dict[int, ExpertUse]
    """Mean use over all tokens"""
    by_domain: dict[int, tuple[ExpertUse, ...]]
    """Use over the tokens of each domain that has any"""
    domain_tokens: tuple[int, ...]
    """Tokens of each of these domains"""
    ranked: list[tuple[int, int]]
    replayed: Replayer
    searched: Replayer
    prompts: tuple[AccessTrace, int]


def read_sources(profile: ProfileReader) -> PlanSources:
    """Read a profile's data for planning.

    Raises:
        ArtifactVersionError: the profile is too old to have the sizes outside the experts.
        CorruptArtifactError: it is damaged.
    """
    skeleton = profile.header.skeleton
    if skeleton is None:
        raise ArtifactVersionError(
            f"{profile.path} lacks the model's sizes outside the experts",
            hint="record it again with moe-tool profile",
        )
    shape = profile.header.shape
    per_token = len(shape.layers) * shape.top_k
    statistics = {layer: profile.statistics(layer) for layer in shape.layers}
    part = part_to_replay(profile)
    by_domain, domain_tokens = domain_uses(profile)
    return PlanSources(
        profile=profile,
        skeleton=skeleton,
        statistics=statistics,
        use={layer: _use(profile, layer, statistics[layer]) for layer in shape.layers},
        by_domain=by_domain,
        domain_tokens=domain_tokens,
        ranked=rank_experts(statistics),
        replayed=Replayer(
            decode_trace(
                profile, part, max_tokens=max(1, _MAX_ACCESSES // per_token), with_guesses=True
            )
        ),
        searched=Replayer(
            decode_trace(profile, "in-sample", max_tokens=max(1, _MAX_SEARCH_ACCESSES // per_token))
        ),
        prompts=prompt_trace(profile, part),
    )


def domain_uses(
    profile: ProfileReader,
) -> tuple[dict[int, tuple[ExpertUse, ...]], tuple[int, ...]]:
    """Return the use by decoder layer and domain, and the domains' tokens; only of domains that
    have any."""
    shape, domain = profile.header.shape, profile.tokens.domain_of_tokens
    uses = {
        layer: use_by_domain(
            profile.indices(layer, "top_k_index"),
            profile.gate_weights(layer),
            domain,
            shape.experts,
        )
        for layer in shape.layers
    }
    return uses, tuple(np.unique(domain, return_counts=True)[1].tolist())


def _use(profile: ProfileReader, layer: int, statistics: ExpertStatistics) -> ExpertUse:
    counts = statistics.in_sample
    squared = mean_squared_gates(
        profile.indices(layer, "top_k_index"),
        profile.gate_weights(layer),
        profile.header.shape.experts,
    )
    return ExpertUse(squared_gate=squared, load=counts.load / max(1, counts.n_tokens))
