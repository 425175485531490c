"""A plan in which every expert has its own number of bits: the least expected loss for an average
or a memory budget."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moe_tool import __version__
from moe_tool.artifacts.bit_prices import BitPrices
from moe_tool.artifacts.hardware_profile import HardwareProfile
from moe_tool.artifacts.pack_plan import LayerBits, PackPlan, PlanLine, PlanPrediction, Quantizer
from moe_tool.byte_sizes import format_bytes
from moe_tool.errors import BudgetError, UsageError
from moe_tool.planning.allocate_bits import (
    WIDTHS,
    allocate,
    allocate_by_layer,
    by_rank,
    spread_evenly,
)
from moe_tool.planning.bit_costs import BitCosts, bit_costs
from moe_tool.planning.build_plan import FIRST_PROMPT_TOKENS, PREDICTION_ERROR
from moe_tool.planning.first_token import seconds_to_first_token
from moe_tool.planning.memory_account import FixedMemory, fixed_memory
from moe_tool.planning.model_costs import ModelCosts, model_costs
from moe_tool.planning.plan_request import PlanRequest
from moe_tool.planning.plan_sources import PlanSources
from moe_tool.policies.eviction import parse_eviction
from moe_tool.runtime.expert_room import ExpertRoom, slots_within, split_slots
from moe_tool.runtime.memory_plan import suggested_budget
from moe_tool.simulator.simulate import Budget, Machine, simulate_decoding

_EVICTION = "lru"


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """One way to hand the bits out."""

    name: str
    nats: float
    """Expected divergence, per token"""
    experts: dict[int, int]
    """By width: how many have it"""
    average_bits: float
    expert_bytes: int


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
        request: budget and limits; its memory in bytes, or "100%" for all experts.
        average_bits: of the weights of all experts; None: as many as fit into the memory.
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
    budget = None if request.memory == "100%" else _bytes_of(request.memory)
    if budget is not None and budget < max(fixed.total_bytes, fixed.loading_bytes):
        raise _too_small(budget, fixed, costs)
    if average_bits is None:
        if budget is None:
            raise UsageError("--bits mixed: for which memory?", hint="--memory SIZE, in bytes")
        chosen = allocate_bytes(costs, budget - fixed.total_bytes)
        average = _describe("", costs, chosen).average_bits
    else:
        if not 0 < average_bits <= WIDTHS[-1]:
            raise UsageError(
                f"--average-bits {average_bits:g}: not possible", hint="--average-bits 2.5"
            )
        average = average_bits
        room = None if budget is None else budget - fixed.total_bytes
        chosen = allocate_average(costs, average, room_bytes=room)
    allocations = (
        _describe("over all layers", costs, chosen),
        *other_allocations(sources, costs, average),
    )
    plan, notes = _plan(sources, hardware, request, costs, chosen, fixed, budget, prices)
    return MixedReport(
        plan=plan,
        allocations=allocations,
        notes=tuple(notes),
        seconds=time.perf_counter() - began,
    )


def allocate_average(
    costs: BitCosts, average_bits: float, *, room_bytes: int | None = None
) -> np.ndarray:
    """Return the widths' columns with the least loss, [L, E] int64.

    Where the experts together are larger than the memory, an expert that will not stay there is
    read whenever it is wanted: its bytes then cost what bytes in memory are worth, so that heat
    counts twice, in what an error costs and in what a read does.

    Args:
        costs: of all experts.
        average_bits: that the widths may have on average.
        room_bytes: of the memory for experts; None: all of them stay.
    """
    nats = costs.nats
    n_layers, n_experts, _ = nats.shape
    size = np.array(WIDTHS, dtype=np.int64)
    room = math.floor(average_bits * n_layers * n_experts + 1e-9)

    def best(cost: np.ndarray) -> np.ndarray:
        found = allocate(
            cost.reshape(-1, len(WIDTHS)),
            np.broadcast_to(size, (n_layers * n_experts, len(WIDTHS))),
            room,
        )
        assert found is not None  # all may be absent
        return found.reshape(n_layers, n_experts)

    chosen = best(nats)
    if room_bytes is None or costs.size_bytes[chosen].sum() <= room_bytes:
        return chosen
    reads = _read_costs(costs, chosen, room_bytes)
    return best(nats + reads)


def allocate_bytes(costs: BitCosts, room_bytes: int) -> np.ndarray:
    """Return the widths' columns with the least loss that all stay in memory, [L, E] int64."""
    n_layers, n_experts, n_widths = costs.nats.shape
    found = allocate(
        costs.nats.reshape(-1, n_widths),
        np.broadcast_to(costs.size_bytes, (n_layers * n_experts, n_widths)),
        room_bytes,
    )
    assert found is not None  # all may be absent
    return found.reshape(n_layers, n_experts)


def other_allocations(
    sources: PlanSources, costs: BitCosts, average_bits: float
) -> tuple[Allocation, ...]:
    """Return what the same bits are expected to give when they are handed out otherwise."""
    named = control_allocations(costs, average_bits)
    return tuple(_describe(name, costs, chosen) for name, chosen in named.items())


def control_allocations(costs: BitCosts, average_bits: float) -> dict[str, np.ndarray]:
    """Return other choices with the same bits: [L, E] int64 columns of WIDTHS by name."""
    n_layers, n_experts, n_widths = costs.nats.shape
    n = n_layers * n_experts
    size = np.broadcast_to(np.array(WIDTHS, dtype=np.int64), costs.nats.shape)
    found: dict[str, np.ndarray] = {}
    by_layer = allocate_by_layer(
        costs.nats, size, math.floor(average_bits * n_experts + 1e-9) * n_layers
    )
    if by_layer is not None:
        found["layer by layer"] = by_layer
    low = max(i for i, width in enumerate(WIDTHS) if width <= average_bits)
    high = min(low + 1, n_widths - 1)
    step = WIDTHS[high] - WIDTHS[low]
    share = 0.0 if step == 0 else (average_bits - WIDTHS[low]) / step
    shuffled = np.random.default_rng(0).permutation(n)
    found["by frequency"] = by_rank(np.argsort(-costs.load, axis=None), low, high, share)
    found["uniform"] = spread_evenly(n, low, high, share)
    found["random"] = by_rank(shuffled, low, high, share)
    return {name: chosen.reshape(n_layers, n_experts) for name, chosen in found.items()}


def layer_bits(layers: Sequence[int], chosen: np.ndarray) -> tuple[LayerBits, ...]:
    """Return columns of WIDTHS as a plan has them."""
    return tuple(
        LayerBits(layer=layer, bits=tuple(WIDTHS[column] for column in row))
        for layer, row in zip(layers, chosen, strict=True)
    )


def _read_costs(costs: BitCosts, chosen: np.ndarray, room_bytes: int) -> np.ndarray:
    """[L, E, W]: nats that the reads of each choice are worth."""
    size = costs.size_bytes[chosen].ravel()
    hottest = np.argsort(-costs.load, axis=None)
    stays = np.zeros(size.shape, dtype=bool)
    stays[hottest] = np.cumsum(size[hottest]) <= room_bytes
    is_read = (~stays).reshape(chosen.shape)
    # What a byte in memory is worth: the loss that one more step down of a middling expert adds.
    two, three = WIDTHS.index(2), WIDTHS.index(3)
    saved = float(np.median(costs.nats[..., two] - costs.nats[..., three]))
    per_byte = saved / float(costs.size_bytes[three] - costs.size_bytes[two])
    found: np.ndarray = (is_read * costs.load)[..., None] * costs.size_bytes * per_byte
    return found


def _describe(name: str, costs: BitCosts, chosen: np.ndarray) -> Allocation:
    widths, counts = np.unique(np.array(WIDTHS)[chosen], return_counts=True)
    return Allocation(
        name=name,
        nats=float(np.take_along_axis(costs.nats, chosen[..., None], axis=2).sum()),
        experts=dict(zip(widths.tolist(), counts.tolist(), strict=True)),
        average_bits=float((widths * counts).sum() / chosen.size),
        expert_bytes=int(costs.size_bytes[chosen].sum()),
    )


def _plan(
    sources: PlanSources,
    hardware: HardwareProfile,
    request: PlanRequest,
    costs: BitCosts,
    chosen: np.ndarray,
    fixed: FixedMemory,
    budget: int | None,
    prices: BitPrices | None,
) -> tuple[PackPlan, list[str]]:
    header = sources.profile.header
    shape = header.shape
    quantizer: Quantizer = "rtn" if prices is None else prices.quantizer
    allocation = _describe("", costs, chosen)
    rooms = tuple(
        ExpertRoom(
            record_bytes=int(costs.size_bytes[WIDTHS.index(width)]),
            n_experts=count,
            n_slots_min=min(shape.top_k + 1, count),
        )
        for width, count in allocation.experts.items()
        if width
    )
    if not rooms:
        raise _too_small(budget or 0, fixed, costs)
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
        n_slots_min=shape.top_k + 1,
        costs=calls.calls,
        hottest=(),
    )
    label = "100%" if budget is None else request.memory
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
        replace(
            fixed.lines[0],
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


def _bytes_of(memory: str) -> int:
    from moe_tool.runtime.memory_plan import parse_memory

    request = parse_memory(memory)
    if request.kind != "bytes":
        raise UsageError(
            f"--memory {memory}: with mixed bits a share of the experts has no size",
            hint="--memory SIZE in bytes, or leave it out with --average-bits",
        )
    return request.size_bytes


def _too_small(budget: int, fixed: FixedMemory, costs: BitCosts) -> BudgetError:
    n_experts = costs.load.size
    one_bit = int(costs.size_bytes[WIDTHS.index(1)])
    needed = max(fixed.total_bytes + n_experts * one_bit, fixed.loading_bytes)
    return BudgetError(
        f"a memory budget of {format_bytes(budget)} ({budget} bytes) is too small: the rest of the "
        f"model takes {format_bytes(fixed.total_bytes)}, with every expert at 1 bit "
        f"{format_bytes(needed)} ({needed} bytes)",
        hint=f"--memory {suggested_budget(needed)}",
    )
