"""A plan in which every expert has its own number of bits: the least expected loss for an average
or a memory budget."""

import math
import time
from dataclasses import dataclass, replace

import numpy as np

from moe_tool import __version__
from moe_tool.artifacts.bit_prices import Allocation, BitPrices
from moe_tool.artifacts.hardware_profile import HardwareProfile
from moe_tool.artifacts.pack_plan import PackPlan, PlanLine, PlanPrediction, Quantizer
from moe_tool.budget.refusal import MemoryLine, too_small
from moe_tool.budget.request import EVERY_EXPERT, MemoryRequest
from moe_tool.budget.slots import ExpertRoom, min_slots, slots_within, split_slots
from moe_tool.errors import BudgetError, UsageError
from moe_tool.planning.allocate_bits import WIDTHS
from moe_tool.planning.bit_costs import BitCosts, bit_costs
from moe_tool.planning.build_plan import FIRST_PROMPT_TOKENS, PREDICTION_ERROR
from moe_tool.planning.first_token import seconds_to_first_token
from moe_tool.planning.memory_account import FixedMemory, fixed_memory
from moe_tool.planning.mixed_allocations import (
    allocate_average,
    allocate_bytes,
    allocate_within,
    describe,
    layer_bits,
    other_allocations,
)
from moe_tool.planning.model_costs import ModelCosts, model_costs
from moe_tool.planning.plan_request import PlanRequest
from moe_tool.planning.plan_sources import PlanSources
from moe_tool.policies.eviction import parse_eviction
from moe_tool.simulator.simulate import Budget, Machine, simulate_decoding

_EVICTION = "lru"


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedReport:
    """A plan, and what else the same bits would have given."""

    plan: PackPlan
    allocations: tuple[Allocation, ...]
    """The chosen one first"""
    notes: tuple[str, ...]
    seconds: float


def build_mixed_plan(
    sources: PlanSources,
    hardware: HardwareProfile,
    request: PlanRequest,
    *,
    average_bits: float | None,
    prices: BitPrices | None,
) -> MixedReport:
    """Return the allocation with the least expected loss, over all layers at once.

    Args:
        sources: of `read_sources`.
        hardware: the machine that it is for.
        request: budget and limits; its memory in bytes, or all experts.
        average_bits: of the weights of all experts; None: as few as the request's limit of loss
            allows, without one as many as fit into the memory.
        prices: measured with the quantizer in use; None: it is rtn.

    Raises:
        BudgetError: the budget does not hold what is beside the experts.
        UsageError: a number that means nothing.
    """
    began = time.perf_counter()
    shape = sources.profile.header.shape
    costs = bit_costs(sources, prices)
    fixed = fixed_memory(
        shape,
        sources.skeleton,
        skeleton_bits=request.skeleton_bits,
        context=request.context,
    )
    budget = None if request.memory == EVERY_EXPERT else _bytes_of(request.memory)
    if budget is not None and budget < max(fixed.total_bytes, fixed.loading_bytes):
        raise _too_small(budget, fixed, costs)
    room = None if budget is None else budget - fixed.total_bytes
    chosen = _choose(costs, room, average_bits=average_bits, max_kl=request.max_kl)
    best = describe("over all layers", costs, chosen)
    plan, notes = _plan(sources, hardware, request, costs, chosen, best, fixed, budget, prices)
    return MixedReport(
        plan=plan,
        allocations=(best, *other_allocations(costs, average_bits or best.average_bits)),
        notes=tuple(notes),
        seconds=time.perf_counter() - began,
    )


def _choose(
    costs: BitCosts, room: int | None, *, average_bits: float | None, max_kl: float | None
) -> np.ndarray:
    """By the average, else by the limit of loss, else by the memory."""
    if average_bits is not None:
        if not 0 < average_bits <= WIDTHS[-1]:
            raise UsageError(
                f"--average-bits {average_bits:g}: not possible", hint="--average-bits 2.5"
            )
        return allocate_average(costs, average_bits, room_bytes=room)
    if max_kl is not None:
        found = allocate_within(costs, max_kl) if max_kl >= 0 else None
        if found is None:
            raise UsageError(f"--max-kl {max_kl:.4g}: not possible", hint="--max-kl 0.01")
        return found
    if room is None:
        raise UsageError(
            "--bits mixed: how many bytes, or how much loss?",
            hint="--memory SIZE, --average-bits 2.5 or --max-kl 0.01",
        )
    return allocate_bytes(costs, room)


def _plan(
    sources: PlanSources,
    hardware: HardwareProfile,
    request: PlanRequest,
    costs: BitCosts,
    chosen: np.ndarray,
    allocation: Allocation,
    fixed: FixedMemory,
    budget: int | None,
    prices: BitPrices | None,
) -> tuple[PackPlan, list[str]]:
    header = sources.profile.header
    shape = header.shape
    quantizer: Quantizer = "rtn" if prices is None else prices.quantizer
    rooms = tuple(
        ExpertRoom(
            record_bytes=int(costs.size_bytes[WIDTHS.index(width)]),
            n_experts=count,
            n_slots_min=min_slots(shape.top_k, count),
        )
        for width, count in allocation.experts.items()
        if width
    )
    if not rooms:
        raise UsageError(
            "nothing would be left of the experts", hint="--average-bits 2.5, or a larger --memory"
        )
    if budget is None:
        slots = split_slots(sum(room.n_experts for room in rooms), rooms)
    else:
        slots = slots_within(budget - fixed.total_bytes, rooms)
    held = sum(count * room.record_bytes for count, room in zip(slots, rooms, strict=True))
    total = max(fixed.total_bytes + held, fixed.loading_bytes)
    if budget is not None and total > budget:
        raise _too_small(budget, fixed, costs)
    calls = _average_costs(sources, hardware, request, costs, chosen)
    n_stored = sum(room.n_experts for room in rooms)
    machine = Machine(
        record_bytes=calls.record_bytes,
        n_slots_min=min_slots(shape.top_k, len(shape.layers) * shape.experts),
        costs=calls.calls,
        hottest=(),
    )
    label = str(request.memory)
    is_all = sum(slots) == n_stored
    n_slots = len(shape.layers) * shape.experts if is_all else sum(slots)
    replay_budget = Budget(label=label, n_slots=n_slots)
    choice = parse_eviction(_EVICTION)
    row = simulate_decoding(sources.replayed, [choice], [replay_budget], machine)[0][0]
    if is_all:
        row = replace(row, hit_rate=1.0, bytes_per_token=0.0, to_belady=None)
    first_s = seconds_to_first_token(
        sources.prompts,
        choice,
        replay_budget,
        machine,
        calls,
        hardware,
        shape=shape,
        bits=str(_nearest_width(allocation.average_bits)),
        skeleton_bits=request.skeleton_bits,
        n_tokens=FIRST_PROMPT_TOKENS,
    )
    lines = (
        *fixed.lines,
        MemoryLine(
            name=f"{sum(slots)} of {n_stored} experts, {allocation.average_bits:.2f} bits",
            size_bytes=held,
        ),
    )
    plan = PackPlan(
        tool_version=__version__,
        identity=header.identity,
        profile_sha256=sources.profile.sha256,
        hardware=hardware.name,
        memory_bytes=total if budget is None else budget,
        context=request.context,
        bits="mixed",
        expert_bits=layer_bits(shape.layers, chosen),
        quantizer=quantizer,
        skeleton_bits=request.skeleton_bits,
        eviction=_EVICTION,
        prefetch="none",
        prediction=PlanPrediction(
            tokens_per_second=row.tokens_per_second,
            error=PREDICTION_ERROR,
            hit_rate=row.hit_rate,
            bytes_per_token=row.bytes_per_token,
            to_belady=row.to_belady,
            seconds_to_first_token=first_s,
            prompt_tokens=FIRST_PROMPT_TOKENS,
            expert_slots=sum(slots),
            loss=math.expm1(min(allocation.nats, 20.0)),
            kl=allocation.nats,
            kl_of_bits=allocation.nats,
        ),
        lines=tuple(PlanLine(name=line.name, size_bytes=line.size_bytes) for line in lines),
    )
    notes = []
    if not is_all:
        notes.append(f"{n_stored - sum(slots)} experts are read when they are wanted")
    n_absent = allocation.experts.get(0, 0)
    if n_absent:
        notes.append(f"{n_absent} experts are left out: their bytes are worth more elsewhere")
    if prices is None:
        notes.append("errors are the profile's, of rounding to nearest; --quantizer gptq has less")
    return plan, notes


def _average_costs(
    sources: PlanSources,
    hardware: HardwareProfile,
    request: PlanRequest,
    costs: BitCosts,
    chosen: np.ndarray,
) -> ModelCosts:
    """A call's costs, those of each width weighted by how often experts of it are wanted."""
    shape = sources.profile.header.shape
    shares = {
        width: float(costs.load[chosen == column].sum()) for column, width in enumerate(WIDTHS)
    }
    total = sum(shares.values()) or 1.0
    found: list[tuple[float, ModelCosts]] = []
    for width, share in shares.items():
        if share and width:
            bits = "native" if width == WIDTHS[-1] else str(width)
            each = model_costs(
                shape, sources.skeleton, hardware, bits=bits, skeleton_bits=request.skeleton_bits
            )
            found.append((share / total, each))
    first = found[0][1]

    def mean(name: str) -> float:
        return sum(share * float(getattr(each.calls, name)) for share, each in found)

    return ModelCosts(
        record_bytes=max(1, round(sum(share * each.record_bytes for share, each in found))),
        matrix_bytes=first.matrix_bytes,
        calls=replace(
            first.calls,
            **{name: mean(name) for name in ("layer_s", "expert_s", "read_one_s", "read_s")},
        ),
    )


def _nearest_width(average: float) -> int:
    return min((1, 2, 3, 4, 8), key=lambda width: abs(width - average))


def _bytes_of(request: MemoryRequest) -> int:
    if request.kind != "bytes":
        raise UsageError(
            f"--memory {request}: with mixed bits a share of the experts has no size",
            hint="--memory SIZE in bytes, or leave it out with --average-bits",
        )
    return request.size_bytes


def _too_small(budget: int, fixed: FixedMemory, costs: BitCosts) -> BudgetError:
    n_experts = costs.load.size
    one_bit = int(costs.size_bytes[WIDTHS.index(1)])
    one_each = MemoryLine(name="every expert at 1 bit", size_bytes=n_experts * one_bit)
    return too_small(
        "the run",
        needed_bytes=max(fixed.total_bytes + one_each.size_bytes, fixed.loading_bytes),
        given_bytes=budget,
        lines=(*fixed.lines, one_each),
        instead=None,
    )
