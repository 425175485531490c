"""The prices of a bundle's manifest as the arrays that policies and the account work with."""

import numpy as np

from moe_tool.artifacts.buddy_map import Buddy
from moe_tool.artifacts.bundle_manifest import BundleManifest
from moe_tool.policies.cheapest_residents import ExpertUse
from moe_tool.policies.misses import LayerBook, PriceBook
from moe_tool.policies.misses.price_book import STRUCTURED, felt_error, leaves_noise


def expert_use(manifest: BundleManifest) -> dict[int, ExpertUse] | None:
    """Return how experts are used, by decoder layer; None where the bundle was packed without a
    profile."""
    if manifest.prices is None or manifest.heat is None:
        return None
    return {
        entry.layer: ExpertUse(squared_gate=np.array(entry.use), load=np.array(heat.load))
        for entry, heat in zip(manifest.prices, manifest.heat, strict=True)
    }


def price_book(manifest: BundleManifest) -> PriceBook | None:
    """Return the prices of every answer that the bundle has; None where it was packed without a
    profile.

    Stand-ins are priced on held-out tokens with the scale that was fitted in-sample, replicas on
    held-out tokens too. A stand-in that is worse than nothing is none.
    """
    if manifest.prices is None:
        return None
    stored = [
        {(record.layer, record.expert) for record in table.records} for table in manifest.replicas
    ]
    layers = {}
    for at, prices in enumerate(manifest.prices):
        n_experts = len(prices.nats)
        eps = np.zeros((1 + len(manifest.replicas), n_experts))
        for level, table in enumerate(manifest.replicas, start=1):
            is_stored = [(prices.layer, e) in stored[level - 1] for e in range(n_experts)]
            felt = felt_error(
                np.array(table.prices[at].eps), is_noise=leaves_noise(table.precision)
            )
            eps[level] = np.where(is_stored, felt, np.inf)
        lists: tuple[tuple[Buddy, ...], ...] = ((),) * n_experts
        if manifest.buddies is not None:
            lists = manifest.buddies.layers[at].buddies
        longest = max(map(len, lists), default=0)
        buddy = np.full((n_experts, longest), -1, dtype=np.int64)
        scale, error = np.zeros(buddy.shape), np.full(buddy.shape, np.inf)
        for expert, candidates in enumerate(lists):
            for column, each in enumerate(candidates):
                if each.price_held_out < 1:
                    buddy[expert, column] = each.expert
                    scale[expert, column] = each.scale
                    error[expert, column] = each.price_held_out
        layers[prices.layer] = LayerBook(
            nats=STRUCTURED * np.array(prices.nats),
            eps=eps,
            buddy=buddy,
            buddy_scale=scale,
            buddy_eps=felt_error(error, is_noise=False),
        )
    own_bytes = manifest.own_bytes // max(1, len(manifest.own_records))
    sizes = (own_bytes, *(table.record_size_bytes for table in manifest.replicas))
    return PriceBook(layers=layers, record_bytes=sizes)
