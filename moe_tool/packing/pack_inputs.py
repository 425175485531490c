"""Inputs of `pack` beside the checkpoint: profile and buddy map, checked against the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_tool.artifacts.buddy_map import BuddyMap
from moe_tool.artifacts.bundle_manifest import BundleBuddies, LayerHeat, LayerPrices
from moe_tool.artifacts.bundle_sections import N_FINE_QUANTILES, N_QUANTILES
from moe_tool.artifacts.expert_ids import ExpertKey
from moe_tool.artifacts.expert_statistics import ExpertStatistics
from moe_tool.artifacts.identity import ModelIdentity, require_same_model
from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.artifacts.resident_use import LayerUse, ResidentUse
from moe_tool.artifacts.router_trace import LayerTrace, TracedTokens, mean_squared_gates
from moe_tool.artifacts.routing_norm import RoutingNorm
from moe_tool.errors import CorruptArtifactError, UsageError
from moe_tool.formats.json_artifact import read_json_artifact
from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.packing.fit_routing_norm import fit_routing_norm
from moe_tool.policies.cheapest_residents import ExpertUse
from moe_tool.policies.misses.prune import ratio_to_heaviest
from moe_tool.policies.misses.replica import unimportance
from moe_tool.policies.robust_use import robust_use, use_by_domain


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileFacts:
    """Facts from a profile that packing needs, or the defaults without one."""

    order: tuple[ExpertKey, ...]
    """Experts in file order, (layer, expert)"""
    sha256: str | None = None
    heat: tuple[LayerHeat, ...] | None = None
    full_hash: str | None = None
    """Hash of the whole checkpoint, known from the profile"""
    prices: tuple[LayerPrices, ...] | None = None
    tokens: TracedTokens | None = None
    resident_use: ResidentUse | None = None
    """Use that residents are chosen by; None: the mean in `prices` and `heat`"""
    routing_norm: RoutingNorm | None = None
    """Norm to notice other text by; None if the profile is too short"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackInputs:
    """Inputs of a pack beside the checkpoint."""

    profile: ProfileFacts
    buddies: BundleBuddies | None
    buddies_name: str
    """Name that tells one buddy map from another; "none" without one"""


def read_pack_inputs(
    profile: Path | None,
    buddies: Path | None,
    identity: ModelIdentity,
    shape: MoeShape,
    *,
    robust: float = 0.0,
) -> PackInputs:
    """Read a profile and a buddy map.

    Args:
        profile: HDF5 file of this model: gives record order, heat and prices, and the tokens that
            replicas are fitted to and measured on.
        robust: share of the worst case over the profile's domains in the use that residents are
            chosen by.

    Raises:
        WrongModelError: one of them belongs to another model.
        CorruptArtifactError: one of them is damaged.
        UsageError: there is a share, and no profile.
    """
    if robust and profile is None:
        raise UsageError(
            f"--robust {robust:g}: the domains are those of a profile, and there is none",
            hint="--profile FILE, of moe-tool profile",
        )
    stand_ins, name = _read_buddies(buddies, identity, shape)
    return PackInputs(
        profile=_read_profile(profile, identity, shape, robust),
        buddies=stand_ins,
        buddies_name=name,
    )


def _read_profile(
    path: Path | None, identity: ModelIdentity, shape: MoeShape, robust: float
) -> ProfileFacts:
    if path is None:
        return ProfileFacts(
            order=tuple((layer, e) for layer in shape.layers for e in range(shape.experts))
        )
    with ProfileReader.open(path) as profile:
        require_same_model(
            profile.header.identity,
            identity,
            artifact=f"the profile {path}",
            remedy=f"moe-tool profile {identity.name} --data builtin",
        )
        heat, order, prices = [], [], []
        for layer in shape.layers:
            statistics = profile.statistics(layer)
            prices.append(_layer_prices(layer, statistics, profile.trace(layer)))
            counts = statistics.in_sample
            share = np.minimum(counts.load / max(counts.n_tokens, 1), 1.0)
            heat.append(LayerHeat(layer=layer, load=tuple(float(x) for x in share)))
            order += [(layer, e) for e in order_experts(counts.load, counts.coactivation)]
        return ProfileFacts(
            sha256=profile.sha256,
            heat=tuple(heat),
            order=tuple(order),
            full_hash=profile.header.identity.full,
            prices=tuple(prices),
            tokens=profile.tokens,
            resident_use=_resident_use(profile, prices, heat, robust) if robust else None,
            routing_norm=fit_routing_norm(
                profile.tokens, shape.layers, shape.experts, profile.router_logits
            ),
        )


def _read_buddies(
    path: Path | None, identity: ModelIdentity, shape: MoeShape
) -> tuple[BundleBuddies | None, str]:
    if path is None:
        return None, "none"
    found = read_json_artifact(path, BuddyMap)
    require_same_model(
        found.identity,
        identity,
        artifact=f"the buddy map {path}",
        remedy=f"moe-tool buddies on a profile of {identity.name}",
    )
    fits = [entry.layer for entry in found.layers] == list(shape.layers) and all(
        len(entry.buddies) == shape.experts for entry in found.layers
    )
    if not fits:
        raise CorruptArtifactError(
            f"the buddy map {path} does not fit the model's "
            f"{len(shape.layers)} layers of {shape.experts} experts",
            hint="make it again with moe-tool buddies",
        )
    return BundleBuddies(
        by=found.by, layers=found.layers
    ), f"{found.by}-{found.k}-{found.profile_sha256}"


def order_experts(load: np.ndarray, coactivation: np.ndarray) -> list[int]:
    """Return one layer's experts in the order in which their records should lie.

    Starts at the hottest expert and continues greedily with the one most often used together with
    the last, so that a token's experts lie close together. Ties go to the hotter, then to the lower
    id.

    Args:
        load: [E] tokens routed to each expert.
        coactivation: [E, E] tokens whose top-k holds both; the diagonal is ignored.
    """
    n_experts = len(load)
    order = [int(np.lexsort((np.arange(n_experts), -load))[0])]
    left = [expert_id for expert_id in range(n_experts) if expert_id != order[0]]
    while left:
        last = order[-1]
        best = max(left, key=lambda e: (int(coactivation[last, e]), int(load[e]), -e))
        order.append(best)
        left.remove(best)
    return order


def _layer_prices(layer: int, statistics: ExpertStatistics, trace: LayerTrace) -> LayerPrices:
    """Return one decoder layer's prices, from the statistics of its experts and its trace."""
    use = mean_squared_gates(trace.top_k_index, trace.top_k_weight, len(statistics.nats))
    weight = trace.top_k_weight.astype(np.float32)
    lighter = np.sort(ratio_to_heaviest(weight), axis=1)[:, :-1]
    return LayerPrices(
        layer=layer,
        nats=tuple(statistics.nats.tolist()),
        use=tuple(use.tolist()),
        unimportance=_quantiles(unimportance(weight), N_FINE_QUANTILES),
        ratio=_quantiles(lighter, N_QUANTILES),
    )


def _resident_use(
    profile: ProfileReader, prices: Sequence[LayerPrices], heat: Sequence[LayerHeat], share: float
) -> ResidentUse:
    domain, layers = profile.tokens.domain_of_tokens, []
    for mean, loads in zip(prices, heat, strict=True):
        index = profile.indices(mean.layer, "top_k_index")
        weight = profile.gate_weights(mean.layer)
        use = robust_use(
            ExpertUse(squared_gate=np.array(mean.use), load=np.array(loads.load)),
            use_by_domain(index, weight, domain, len(mean.use)),
            share,
        )
        layers.append(
            LayerUse(
                layer=mean.layer,
                squared_gate=tuple(use.squared_gate.tolist()),
                load=tuple(use.load.tolist()),
            )
        )
    return ResidentUse(share=share, layers=tuple(layers))


def _quantiles(values: np.ndarray, n: int) -> tuple[float, ...]:
    if not values.size:
        return (1.0,) * n
    found = np.quantile(values, np.linspace(0, 1, n), method="inverted_cdf")
    return tuple(np.clip(found, 0.0, 1.0).tolist())
