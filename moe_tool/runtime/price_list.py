"""Prices in a bundle's manifest as arrays, for policies and the account."""

import numpy as np

from moe_tool.artifacts.buddy_map import Buddy
from moe_tool.artifacts.bundle_manifest import BundleManifest
from moe_tool.artifacts.routing import PRIMARY
from moe_tool.policies.cheapest_residents import ExpertUse
from moe_tool.policies.misses import LayerBook, PriceBook
from moe_tool.policies.misses.price_book import STRUCTURED, effective_error


def expert_use(manifest: BundleManifest) -> dict[int, ExpertUse] | None:
    """Return the mean use of experts by decoder layer; None if it was packed without a profile."""
    if manifest.prices is None or manifest.heat is None:
        return None
    return {
        entry.layer: ExpertUse(squared_gate=np.array(entry.use), load=np.array(heat.load))
        for entry, heat in zip(manifest.prices, manifest.heat, strict=True)
    }


def resident_use(manifest: BundleManifest) -> dict[int, ExpertUse] | None:
    """Return the use that residents are chosen by; None if it was packed without a profile."""
    use = manifest.resident_use
    if use is None or manifest.prices is None:
        return expert_use(manifest)
    return {
        entry.layer: ExpertUse(squared_gate=np.array(entry.squared_gate), load=np.array(entry.load))
        for entry in use.layers
    }


def price_book(manifest: BundleManifest) -> PriceBook | None:
    """Return the prices of every answer in the bundle; None if it was packed without a profile.

    Stand-ins, with scales fitted in-sample, and replicas are priced on held-out tokens. A stand-in
    that is worse than dropping the expert is left out.
    """
    if manifest.prices is None:
        return None
    sizes = record_sizes(manifest)
    layers = {}
    for at, prices in enumerate(manifest.prices):
        n_experts = len(prices.nats)
        eps = np.zeros((1 + len(manifest.cheaper), n_experts))
        for form, table in enumerate(manifest.cheaper, start=1):
            error = np.full(n_experts, np.inf)
            for record in table.records:
                if record.layer == prices.layer and record.eps is not None:
                    error[record.expert] = record.eps
            eps[form] = effective_error(error, is_noise=table.precision.leaves_noise)
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
            record_bytes=sizes[prices.layer],
            buddy=buddy,
            buddy_scale=scale,
            buddy_eps=effective_error(error, is_noise=False),
        )
    return PriceBook(layers=layers)


def record_sizes(manifest: BundleManifest) -> dict[int, np.ndarray]:
    """Return decoder layer -> [F, E] int64 record sizes in bytes; 0 if a form is not stored."""
    shape = manifest.shape
    sizes = {
        layer: np.zeros((1 + len(manifest.cheaper), shape.experts), dtype=np.int64)
        for layer in shape.layers
    }
    tables = [(PRIMARY, table) for table in manifest.primaries]
    tables += enumerate(manifest.cheaper, start=1)
    for form, table in tables:
        for record in table.records:
            sizes[record.layer][form, record.expert] = table.record_size_bytes
    return sizes
