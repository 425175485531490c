"""Ways to pack experts for a budget: one precision, or the mixed widths with the least loss."""

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from moe_tool.artifacts.bit_prices import Allocation, BitPrices
from moe_tool.artifacts.hardware_profile import HardwareProfile
from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.artifacts.pack_plan import Bits
from moe_tool.artifacts.precision import NATIVE_WIDTH
from moe_tool.budget.request import MemoryRequest
from moe_tool.budget.slots import ExpertRoom, min_slots
from moe_tool.errors import UsageError
from moe_tool.planning.bit_costs import BitCosts, bit_costs
from moe_tool.planning.candidate import PackedExperts
from moe_tool.planning.memory_account import FixedMemory, account_of_bits, fixed_memory
from moe_tool.planning.mixed_allocations import (
    allocate_average,
    allocate_bytes,
    allocate_within,
    control_allocations,
    describe,
    layer_bits,
)
from moe_tool.planning.model_costs import (
    ModelCosts,
    model_costs,
    record_precision,
    replay_machine,
    timed_as,
)
from moe_tool.planning.plan_request import PlanRequest
from moe_tool.planning.plan_sources import PlanSources
from moe_tool.planning.profile_prices import nats_of_bits, predicted_loss
from moe_tool.planning.published_bits import allocate_published, published_costs


def uniform_experts(
    sources: PlanSources, hardware: HardwareProfile, request: PlanRequest, bits: Bits
) -> PackedExperts:
    """Return all experts at one precision.

    Raises:
        BudgetError: they do not fit; the hint names the smallest budget that works.
    """
    memory = account_of_bits(request.memory, sources, request, bits)
    header = sources.profile.header
    costs = model_costs(header, hardware, bits=bits, skeleton_bits=request.skeleton_bits)
    shape = header.shape
    n_experts = shape.experts * len(shape.layers)
    return PackedExperts(
        bits=bits,
        compute_bits=timed_as(record_precision(header, bits)),
        n_experts=n_experts,
        n_stored=n_experts,
        memory=memory,
        costs=costs,
        machine=replay_machine(shape, costs, sources.ranked),
        nats=nats_of_bits(sources, bits),
        loss=predicted_loss(sources.statistics, bits),
    )


def mixed_experts(
    sources: PlanSources,
    hardware: HardwareProfile,
    request: PlanRequest,
    prices: BitPrices | None,
) -> PackedExperts:
    """Return experts at the widths with the least expected loss, or as published if the request
    says so; `prices` None for rtn.

    Raises:
        BudgetError: the budget is too small for the memory beside the experts.
        UsageError: no widths keep the limit, or every expert would be removed; or the published
            program has no solution.
    """
    shape, costs = sources.profile.header.shape, bit_costs(sources, prices)
    fixed = fixed_memory(
        shape, sources.skeleton, skeleton_bits=request.skeleton_bits, context=request.context
    )
    ways = {
        "over all layers": _allocate(costs, request, _expert_room(request.memory, fixed, costs))
    }
    if request.cost is not None:
        assert request.average_bits is not None  # check_request
        published = published_costs(sources, prices, request.cost)
        by_published = allocate_published(costs, published, request.average_bits)
        ways = {"as published": by_published, **ways}
    name, chosen = next(iter(ways.items()))
    found = describe(name, costs, chosen)
    rooms = _rooms(shape, found, costs)
    mean = _mean_costs(sources, hardware, request, costs, chosen)
    ways |= control_allocations(costs, request.average_bits or found.average_bits)
    return PackedExperts(
        bits="mixed",
        expert_bits=layer_bits(costs, shape.layers, chosen),
        allocations=tuple(describe(name, costs, each) for name, each in ways.items()),
        quantizer="rtn" if prices is None else prices.quantizer,
        compute_bits=str(min((1, 2, 3, 4, 8), key=lambda width: abs(width - found.average_bits))),
        n_experts=shape.experts * len(shape.layers),
        n_stored=sum(room.n_experts for room in rooms),
        memory=fixed.within(request.memory, rooms),
        costs=mean,
        machine=replay_machine(shape, mean, []),
        nats=found.nats,
        loss=math.expm1(min(found.nats, 20.0)),
    )


def _expert_room(memory: MemoryRequest, fixed: FixedMemory, costs: BitCosts) -> int | None:
    """Return the bytes that a budget leaves for experts; None: no limit."""
    if memory.kind != "bytes":
        return None
    least = fixed.least
    if memory.size_bytes < max(least.total_bytes, least.loading_bytes):
        size, n = int(costs.size_bytes[costs.widths.index(1)]), costs.load.size
        # No expert would fit: this refuses with a budget for all experts at 1 bit.
        fixed.within(memory, (ExpertRoom(record_bytes=size, n_experts=n, n_slots_min=n),))
    return memory.size_bytes - least.total_bytes


def _allocate(costs: BitCosts, request: PlanRequest, room_bytes: int | None) -> np.ndarray:
    """Return columns of widths, [L, E], by average bits, else by max_kl, else by memory."""
    if request.average_bits is not None:
        return allocate_average(costs, request.average_bits, room_bytes=room_bytes)
    if request.max_kl is not None:
        return allocate_within(costs, request.max_kl)
    assert room_bytes is not None  # check_request
    return allocate_bytes(costs, room_bytes)


def _rooms(shape: MoeShape, found: Allocation, costs: BitCosts) -> tuple[ExpertRoom, ...]:
    rooms = tuple(
        ExpertRoom(
            record_bytes=int(costs.size_bytes[costs.widths.index(width)]),
            n_experts=count,
            n_slots_min=min_slots(shape.top_k, count),
        )
        for width, count in found.experts.items()
        if width
    )
    if not rooms:
        raise UsageError(
            "every expert would be removed", hint="--average-bits 2.5, or a larger --memory"
        )
    return rooms


def _mean_costs(
    sources: PlanSources,
    hardware: HardwareProfile,
    request: PlanRequest,
    costs: BitCosts,
    chosen: np.ndarray,
) -> ModelCosts:
    """Return the mean costs of a call over widths, weighted by the use of their experts."""
    total = float(costs.load.sum()) or 1.0
    each, shares = [], []
    for column, width in enumerate(costs.widths):
        is_stored = chosen == column
        if width and is_stored.any():
            bits = "native" if width == NATIVE_WIDTH else str(width)
            each.append(
                model_costs(
                    sources.profile.header,
                    hardware,
                    bits=bits,
                    skeleton_bits=request.skeleton_bits,
                )
            )
            shares.append(float(costs.load[is_stored].sum()) / total)

    def mean(values: Iterable[float]) -> float:
        return sum(share * value for share, value in zip(shares, values, strict=True))

    calls = {
        name: mean(getattr(one.calls, name) for one in each)
        for name in ("layer_s", "expert_s", "read_one_s", "read_s")
    }
    return ModelCosts(
        record_bytes=max(1, round(mean(one.record_bytes for one in each))),
        matrix_bytes=each[0].matrix_bytes,
        calls=replace(each[0].calls, **calls),
    )
