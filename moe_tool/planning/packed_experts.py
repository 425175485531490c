"""Experts as they could be packed for a budget: all at one precision, or the widths that lose
least."""

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from moe_tool.artifacts.bit_prices import BitPrices
from moe_tool.artifacts.hardware_profile import HardwareProfile
from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.artifacts.pack_plan import Bits
from moe_tool.budget.refusal import MemoryLine, too_small
from moe_tool.budget.request import MemoryRequest
from moe_tool.budget.slots import ExpertRoom, min_slots
from moe_tool.errors import BudgetError, UsageError
from moe_tool.planning.allocate_bits import WIDTHS
from moe_tool.planning.bit_costs import BitCosts
from moe_tool.planning.bit_price import predicted_loss
from moe_tool.planning.candidate import PackedExperts
from moe_tool.planning.memory_account import FixedMemory, account, account_of_bits, fixed_memory
from moe_tool.planning.mixed_allocations import (
    Allocation,
    allocate_average,
    allocate_bytes,
    allocate_within,
    describe,
    layer_bits,
)
from moe_tool.planning.model_costs import ModelCosts, model_costs
from moe_tool.planning.plan_request import PlanRequest
from moe_tool.planning.plan_sources import PlanSources
from moe_tool.planning.profile_prices import nats_of_bits
from moe_tool.simulator.simulate import Machine


def uniform_experts(
    sources: PlanSources, hardware: HardwareProfile, request: PlanRequest, bits: Bits
) -> PackedExperts:
    """Return all experts at one precision.

    Args:
        sources: of the profile.
        hardware: the machine that it is for.
        request: budget and skeleton.
        bits: precision of the experts.

    Raises:
        BudgetError: they do not fit: with the least that works.
    """
    shape = sources.profile.header.shape
    memory = account_of_bits(request.memory, sources, request, bits)
    costs = model_costs(
        shape, sources.skeleton, hardware, bits=bits, skeleton_bits=request.skeleton_bits
    )
    positions = {layer: at for at, layer in enumerate(shape.layers)}
    hottest = [positions[layer] * shape.experts + expert for layer, expert in sources.ranked]
    n_experts = shape.experts * len(shape.layers)
    return PackedExperts(
        bits=bits,
        compute_bits=bits,
        n_experts=n_experts,
        n_stored=n_experts,
        memory=memory,
        costs=costs,
        machine=_machine(shape, costs, hottest),
        nats=nats_of_bits(sources, bits),
        loss=predicted_loss(sources.statistics, bits),
    )


def mixed_experts(
    sources: PlanSources,
    hardware: HardwareProfile,
    request: PlanRequest,
    costs: BitCosts,
    prices: BitPrices | None,
) -> tuple[PackedExperts, Allocation]:
    """Return experts of the widths with the least expected loss, and the allocation in numbers.

    Args:
        sources: of the profile.
        hardware: the machine that it is for.
        request: budget and limits.
        costs: of every width of every expert.
        prices: measured with the quantizer in use; None: it is rtn.

    Raises:
        BudgetError: the budget does not hold what is beside the experts.
        UsageError: a limit that no widths keep, or that leaves no expert.
    """
    shape = sources.profile.header.shape
    fixed = fixed_memory(
        shape, sources.skeleton, skeleton_bits=request.skeleton_bits, context=request.context
    )
    chosen = _allocate(costs, request, _expert_room(request.memory, fixed, costs))
    found = describe("over all layers", costs, chosen)
    rooms = _rooms(shape, found, costs)
    memory = account(request.memory, fixed, rooms)
    mean = _mean_costs(sources, hardware, request, costs, chosen)
    packed = PackedExperts(
        bits="mixed",
        expert_bits=layer_bits(shape.layers, chosen),
        quantizer="rtn" if prices is None else prices.quantizer,
        compute_bits=str(min((1, 2, 3, 4, 8), key=lambda width: abs(width - found.average_bits))),
        n_experts=shape.experts * len(shape.layers),
        n_stored=sum(room.n_experts for room in rooms),
        memory=memory,
        costs=mean,
        machine=_machine(shape, mean, []),
        nats=found.nats,
        loss=math.expm1(min(found.nats, 20.0)),
    )
    return packed, found


def _machine(shape: MoeShape, costs: ModelCosts, hottest: list[int]) -> Machine:
    return Machine(
        record_bytes=costs.record_bytes,
        n_slots_min=min_slots(shape.top_k, shape.experts * len(shape.layers)),
        costs=costs.calls,
        hottest=hottest,
    )


def _expert_room(memory: MemoryRequest, fixed: FixedMemory, costs: BitCosts) -> int | None:
    """Return the bytes that a budget leaves for experts; None: as many as they take."""
    if memory.kind != "bytes":
        return None
    if memory.size_bytes < max(fixed.total_bytes, fixed.loading_bytes):
        raise _holds_no_expert(memory.size_bytes, fixed, costs)
    return memory.size_bytes - fixed.total_bytes


def _holds_no_expert(budget: int, fixed: FixedMemory, costs: BitCosts) -> BudgetError:
    one_bit = costs.load.size * int(costs.size_bytes[WIDTHS.index(1)])
    return too_small(
        "the run",
        needed_bytes=max(fixed.total_bytes + one_bit, fixed.loading_bytes),
        given_bytes=budget,
        lines=(*fixed.lines, MemoryLine(name="every expert at 1 bit", size_bytes=one_bit)),
        instead=None,
    )


def _allocate(costs: BitCosts, request: PlanRequest, room_bytes: int | None) -> np.ndarray:
    """Return columns of WIDTHS, [L, E]: by the average, else by the limit, else by the memory."""
    if request.average_bits is not None:
        return allocate_average(costs, request.average_bits, room_bytes=room_bytes)
    if request.max_kl is not None:
        return allocate_within(costs, request.max_kl)
    assert room_bytes is not None  # check_request
    return allocate_bytes(costs, room_bytes)


def _rooms(shape: MoeShape, found: Allocation, costs: BitCosts) -> tuple[ExpertRoom, ...]:
    rooms = tuple(
        ExpertRoom(
            record_bytes=int(costs.size_bytes[WIDTHS.index(width)]),
            n_experts=count,
            n_slots_min=min_slots(shape.top_k, count),
        )
        for width, count in found.experts.items()
        if width
    )
    if not rooms:
        raise UsageError(
            "nothing would be left of the experts", hint="--average-bits 2.5, or a larger --memory"
        )
    return rooms


def _mean_costs(
    sources: PlanSources,
    hardware: HardwareProfile,
    request: PlanRequest,
    costs: BitCosts,
    chosen: np.ndarray,
) -> ModelCosts:
    """Return a call's costs, those of each width weighted by how often its experts are wanted."""
    shape = sources.profile.header.shape
    loads = {
        width: float(costs.load[chosen == column].sum()) for column, width in enumerate(WIDTHS)
    }
    total = sum(loads.values()) or 1.0
    each = {
        width: model_costs(
            shape,
            sources.skeleton,
            hardware,
            bits="native" if width == WIDTHS[-1] else str(width),
            skeleton_bits=request.skeleton_bits,
        )
        for width, load in loads.items()
        if load and width
    }
    shares = {width: loads[width] / total for width in each}
    first = next(iter(each.values()))
    calls = {
        name: _mean(shares, {width: getattr(of.calls, name) for width, of in each.items()})
        for name in ("layer_s", "expert_s", "read_one_s", "read_s")
    }
    record_bytes = _mean(shares, {width: of.record_bytes for width, of in each.items()})
    return ModelCosts(
        record_bytes=max(1, round(record_bytes)),
        matrix_bytes=first.matrix_bytes,
        calls=replace(first.calls, **calls),
    )


def _mean(shares: Mapping[int, float], values: Mapping[int, float]) -> float:
    return sum(share * float(values[width]) for width, share in shares.items())
