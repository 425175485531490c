"""A profile's prices as a book, before anything is packed."""

import numpy as np

from moe_tool.artifacts.expert_statistics import PRICED_WIDTHS
from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.artifacts.pack_plan import Bits
from moe_tool.artifacts.precision import IntegerPrecision, replica_precisions
from moe_tool.formats.expert_record import record_layout
from moe_tool.planning.model_costs import record_size
from moe_tool.planning.plan_sources import PlanSources
from moe_tool.policies.misses import LayerBook, PriceBook


def replicas_below(bits: Bits) -> str:
    """Return the cheaper forms that a plan may use beside experts of these bits, as `--replicas`
    takes them."""
    return "3,2,1" if bits == "4" else "4,3,2,1"


def profile_prices(sources: PlanSources, bits: Bits, replicas: str) -> PriceBook:
    """Return the prices of experts at `bits` with replicas beside them.

    The error of a replica is taken relative to the checkpoint's expert, of which the profile has
    measured it, also where the experts themselves have fewer bits. No expert stands in for another:
    that is for a bundle's own buddies.

    Args:
        sources: of the profile.
        bits: of the experts.
        replicas: widths, as `replicas_below` names them.
    """
    shape = sources.profile.header.shape
    forms = replica_precisions(replicas)
    widths = [form.width_bits for form in forms if isinstance(form, IntegerPrecision)]
    columns = [PRICED_WIDTHS.index(width) for width in widths]
    nobody = np.zeros((shape.experts, 0))
    layers = {}
    for layer in shape.layers:
        each = sources.statistics[layer]
        whole = np.zeros((1, shape.experts))
        layers[layer] = LayerBook(
            nats=each.nats,
            eps=np.concatenate([whole, each.eps_bits[:, columns].T.astype(np.float64)]),
            buddy=nobody.astype(np.int64),
            buddy_scale=nobody,
            buddy_eps=nobody,
        )
    sizes = (_replica_size(shape, form) for form in forms if isinstance(form, IntegerPrecision))
    return PriceBook(layers=layers, record_bytes=(record_size(shape, bits), *sizes))


def nats_of_bits(sources: PlanSources, bits: Bits) -> float:
    """Return what experts at these bits are expected to cost against the checkpoint, nats per
    token.

    Args:
        sources: of the profile.
        bits: of all experts.
    """
    if bits == "native":
        return 0.0
    column = PRICED_WIDTHS.index(int(bits))
    return sum(
        float(
            (
                sources.use[layer].squared_gate
                * each.nats
                * each.eps_bits[:, column].astype(np.float64) ** 2
            ).sum()
        )
        for layer, each in sources.statistics.items()
    )


def _replica_size(shape: MoeShape, form: IntegerPrecision) -> int:
    return record_layout(shape.expert_tensors, shape.dtype, form).size_bytes
