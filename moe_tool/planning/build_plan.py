"""The best plan for a memory budget: one list of candidates, one choice, one plan."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moe_tool.artifacts.bit_prices import Allocation, BitPrices
from moe_tool.artifacts.hardware_profile import HardwareProfile
from moe_tool.artifacts.pack_plan import Bits, PackPlan
from moe_tool.artifacts.simulation_report import PrefetchRow, SimulatedRow
from moe_tool.budget.request import MemoryRequest
from moe_tool.errors import BudgetError
from moe_tool.planning.candidate import Candidate, PackedExperts
from moe_tool.planning.choose import choose, out_of_reach
from moe_tool.planning.eviction_replays import replay_evictions
from moe_tool.planning.lossy_answers import lossy_answers
from moe_tool.planning.make_pack_plan import make_pack_plan
from moe_tool.planning.neighbours import Neighbour, neighbours
from moe_tool.planning.packed_experts import mixed_experts, uniform_experts
from moe_tool.planning.plan_notes import (
    bit_notes,
    eviction_note,
    limit_note,
    mixed_notes,
    overhead_notes,
    prefetch_note,
)
from moe_tool.planning.plan_request import PlanRequest, check_request
from moe_tool.planning.plan_sources import PlanSources
from moe_tool.planning.profile_prices import predicted_loss
from moe_tool.policies.eviction import parse_eviction
from moe_tool.progress import SILENT, Progress
from moe_tool.simulator.simulate import Budget, simulate_prefetch


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """A plan, and what it was chosen from."""

    plan: PackPlan
    best: tuple[SimulatedRow, ...]
    """The three that read least, the chosen one first; fewer where fewer were replayed"""
    lru: SimulatedRow
    bound: SimulatedRow
    prefetch: PrefetchRow | None
    allocations: tuple[Allocation, ...]
    """Mixed bits: the chosen widths, then other ways to hand out as many bits; else empty"""
    neighbours: tuple[Neighbour, ...]
    """Smaller and larger budgets, ascending; the last holds every expert"""
    notes: tuple[str, ...]
    seconds: float


def build_plan(
    sources: PlanSources,
    hardware: HardwareProfile,
    request: PlanRequest,
    *,
    prices: BitPrices | None = None,
    progress: Progress = SILENT,
) -> PlanReport:
    """Return the fastest plan that keeps the budget and the limits.

    Args:
        sources: of `read_sources`.
        hardware: the machine that it is for.
        request: budget and limits.
        prices: mixed bits: measured with the quantizer in use; None: it is rtn.
        progress: told about the steps.

    Raises:
        BudgetError: nothing that is allowed fits: with the least that works.
        UsageError: a request that means nothing.
    """
    began = time.perf_counter()
    check_request(request)
    packed, notes = _packed(sources, hardware, request, prices)
    candidates = [
        each for experts in packed for each in _candidates(sources, request, experts, progress)
    ]
    chosen = choose(candidates, max_kl=request.max_kl)
    if chosen is None:
        raise out_of_reach(candidates, sources, request)
    prefetch = _try_prefetch(sources, chosen)
    plan = make_pack_plan(
        sources, hardware, request, chosen, prefetches=prefetch is not None and prefetch.pays
    )
    return PlanReport(
        plan=plan,
        best=chosen.exact.rows[:3],
        lru=chosen.exact.lru,
        bound=chosen.exact.bound,
        prefetch=prefetch,
        allocations=chosen.experts.allocations,
        neighbours=tuple(neighbours(sources, request, chosen)),
        notes=(*notes, *_notes_of_choice(sources, request, chosen, prefetch)),
        seconds=time.perf_counter() - began,
    )


def plan_curve(
    build: Callable[[MemoryRequest], PlanReport], memories: Sequence[MemoryRequest]
) -> tuple[list[PlanReport], list[tuple[str, BudgetError]]]:
    """Return the plans of several budgets, and the refusals of those that are too small."""
    reports, refused = [], []
    for memory in memories:
        try:
            reports.append(build(memory))
        except BudgetError as error:
            refused.append((str(memory), error))
    return reports, refused


def _packed(
    sources: PlanSources,
    hardware: HardwareProfile,
    request: PlanRequest,
    prices: BitPrices | None,
) -> tuple[list[PackedExperts], list[str]]:
    """Return the precisions that are allowed and fit, most bits first, and why others are not."""
    if request.is_mixed:
        return [mixed_experts(sources, hardware, request, prices)], []
    every: tuple[Bits, ...] = ("native", "8", "4") if request.bits is None else (request.bits,)
    losses = {bits: predicted_loss(sources.statistics, bits) for bits in every}
    is_free = request.bits is not None or request.max_kl is not None
    packed: list[PackedExperts] = []
    refused: dict[Bits, BudgetError] = {}
    for bits, loss in losses.items():
        if is_free or loss <= request.max_loss:
            try:
                packed.append(uniform_experts(sources, hardware, request, bits))
            except BudgetError as error:
                refused[bits] = error
    if not packed:  # native experts lose nothing: some were allowed
        raise list(refused.values())[-1]
    return packed, [] if is_free else bit_notes(request, losses, tuple(refused))


def _candidates(
    sources: PlanSources, request: PlanRequest, experts: PackedExperts, progress: Progress
) -> list[Candidate]:
    """Return the ways to answer misses, lossy ones first, under a limit alone."""
    exact = replay_evictions(sources, experts, str(request.memory), progress)
    answers = []
    if request.max_kl is not None:
        answers = lossy_answers(sources, experts, experts.memory.n_slots)
    found = [Candidate(experts=experts, exact=exact, lossy=each) for each in answers]
    return [*found, Candidate(experts=experts, exact=exact)]


def _try_prefetch(sources: PlanSources, chosen: Candidate) -> PrefetchRow | None:
    best = chosen.exact.rows[0]
    if chosen.lossy is not None or chosen.experts.bits == "mixed":
        return None
    if best.hit_rate >= 1 or sources.replayed.trace.n_layers < 2:
        return None
    budget = Budget(label=best.memory, n_slots=best.slots)
    choice = parse_eviction(best.eviction)
    return simulate_prefetch(sources.replayed, choice, budget, chosen.experts.machine, depth=1)


def _notes_of_choice(
    sources: PlanSources, request: PlanRequest, chosen: Candidate, prefetch: PrefetchRow | None
) -> list[str]:
    if chosen.experts.bits == "mixed":
        return mixed_notes(chosen)
    notes = [] if request.max_kl is None else [limit_note(chosen)]
    if chosen.lossy is None:
        notes += [*chosen.exact.notes, eviction_note(chosen)]
    notes += overhead_notes(chosen, len(sources.profile.header.shape.layers))
    return notes if prefetch is None else [*notes, prefetch_note(prefetch)]
