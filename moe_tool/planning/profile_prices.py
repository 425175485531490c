"""Prices of bits and of answers from a profile, before anything is packed."""

import math

import numpy as np

from moe_tool.artifacts.expert_statistics import PRICED_WIDTHS, ExpertStatistics
from moe_tool.artifacts.pack_plan import Bits
from moe_tool.artifacts.precision import (
    IntegerPrecision,
    WholeExpertPrecision,
    precision_from_bits,
    replica_precisions,
)
from moe_tool.formats.profile_hdf5 import ProfileHeader
from moe_tool.formats.record_form import record_form
from moe_tool.planning.model_costs import record_size, timed_as
from moe_tool.planning.plan_sources import PlanSources
from moe_tool.policies.misses import LayerBook, PriceBook
from moe_tool.policies.misses.price_book import STRUCTURED, effective_error


def replicas_below(precision: WholeExpertPrecision) -> str:
    """Return the replicas that a plan may use beside experts of a precision, as `--replicas` takes
    them."""
    return "3,2,1" if timed_as(precision) == "4" else "4,3,2,1"


def profile_prices(sources: PlanSources, bits: Bits, replicas: str) -> PriceBook:
    """Return the prices of experts at `bits` with replicas beside them.

    A replica's error is relative to the checkpoint's expert, as the profile measured it, even if
    the primary forms have fewer bits. Stand-ins are not considered: they need a buddy map.
    """
    return prices_of_bits(sources.profile.header, sources.statistics, bits, replicas)


def prices_of_bits(
    header: ProfileHeader, statistics: dict[int, ExpertStatistics], bits: Bits, replicas: str
) -> PriceBook:
    """Return what `profile_prices` does, from a profile's header and statistics alone."""
    shape = header.shape
    forms = [f for f in replica_precisions(replicas) if f.kind == "integer"]
    nobody = np.zeros((shape.experts, 0))
    sizes = [
        record_size(header, bits),
        *(record_form(shape, form).layout.size_bytes for form in forms),
    ]
    layers = {}
    for layer in shape.layers:
        each = statistics[layer]
        whole = np.zeros(shape.experts)
        layers[layer] = LayerBook(
            nats=STRUCTURED * each.nats,
            record_bytes=np.repeat([sizes], shape.experts, axis=0).T,
            eps=np.stack([whole, *(_effective_errors(each, form) for form in forms)]),
            buddy=nobody.astype(np.int64),
            buddy_scale=nobody,
            buddy_eps=nobody,
        )
    return PriceBook(layers=layers)


def nats_of_bits(sources: PlanSources, bits: Bits) -> float:
    """Return the expected divergence of experts at these bits from the checkpoint, nats per
    token."""
    if bits == "native":
        return 0.0
    form = precision_from_bits(bits)
    assert form.kind == "integer"
    total = 0.0
    for layer, each in sources.statistics.items():
        squared = _effective_errors(each, form) ** 2
        total += float((sources.use[layer].squared_gate * each.nats * squared).sum())
    return STRUCTURED * total


def predicted_loss(statistics: dict[int, ExpertStatistics], bits: Bits) -> float:
    """Return the predicted relative increase of perplexity with all experts at these bits.

    A layer's output error is its experts' mean squared relative error, weighted by use; times the
    layer's sensitivity it is KL in nats, and layers add up. Errors of experts computed together
    cancel in part, so that this is an upper estimate.
    """
    if bits == "native":
        return 0.0
    column = PRICED_WIDTHS.index(int(bits))
    divergence = 0.0
    for each in statistics.values():
        load = each.in_sample.load.astype(np.float64)
        squared = each.eps_bits[:, column].astype(np.float64) ** 2
        mean = float((load * squared).sum() / load.sum()) if load.any() else float(squared.mean())
        divergence += each.sensitivity * mean
    return math.expm1(min(divergence, 20.0))


def _effective_errors(statistics: ExpertStatistics, form: IntegerPrecision) -> np.ndarray:
    eps = statistics.eps_bits[:, PRICED_WIDTHS.index(form.width_bits)]  # [E]
    return effective_error(eps, is_noise=form.leaves_noise)
