"""Story of `plan`: one list of candidates, one choice, one plan."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moe_tool.artifacts.bit_prices import Allocation, BitPrices
from moe_tool.artifacts.hardware_profile import HardwareProfile
from moe_tool.artifacts.pack_plan import Bits, PackPlan
from moe_tool.artifacts.simulation_report import CachePenalty, PrefetchRow, SimulatedRow
from moe_tool.budget.request import MemoryRequest
from moe_tool.budget.sizes import format_bytes
from moe_tool.errors import BudgetError
from moe_tool.planning.allocate_bits import WIDTHS
from moe_tool.planning.cached_replica import replay_cached_replica, search_cached_replica
from moe_tool.planning.candidate import (
    Candidate,
    EvictionReplays,
    LossyAnswers,
    PackedExperts,
)
from moe_tool.planning.choose import choose, out_of_reach
from moe_tool.planning.eviction_replays import replay_evictions, replay_one
from moe_tool.planning.lossy_answers import lossy_answers
from moe_tool.planning.make_pack_plan import make_pack_plan
from moe_tool.planning.model_costs import useful_widths
from moe_tool.planning.packed_experts import mixed_experts, uniform_experts
from moe_tool.planning.plan_notes import (
    bit_notes,
    caches_note,
    eviction_note,
    kept_notes,
    limit_note,
    mixed_notes,
    overhead_notes,
    prefetch_note,
    robust_note,
)
from moe_tool.planning.plan_request import PlanRequest, check_request
from moe_tool.planning.plan_sources import PlanSources
from moe_tool.planning.profile_prices import predicted_loss
from moe_tool.progress import SILENT, Progress
from moe_tool.simulator.simulate import Budget, simulate_prefetch

_AUTO_WIDTHS = (8, 4)
"""Widths that a plan without --bits chooses from, beside native"""
_BUDGET_STEPS = (0.5, 0.75, 1.25, 1.5, 2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbour:
    """Prediction for another budget."""

    memory_bytes: int
    tokens_per_second: float
    ratio: float
    """Speed over that of the plan"""
    kl: float | None
    """Expected divergence in nats per token; None if misses are answered exactly"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """A plan with its alternatives."""

    plan: PackPlan
    best: tuple[SimulatedRow, ...]
    """Up to three eviction policies that read least, the chosen one first"""
    lru: SimulatedRow
    bound: SimulatedRow
    prefetch: PrefetchRow | None
    penalties: tuple[CachePenalty, ...]
    """Held-out penalties of caches of two forms: of HOBBIT with the weights found in-sample, then
    of others; empty if no limit allows lossy answers, or none was found within it"""
    allocations: tuple[Allocation, ...]
    """Chosen widths for mixed bits, then controls with as many bits; else empty"""
    neighbours: tuple[Neighbour, ...]
    """Predictions for other budgets, ascending; the last holds every expert"""
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
        prices: bit prices for mixed bits with another quantizer than rtn.

    Raises:
        BudgetError: nothing allowed fits; the hint names the smallest budget that works.
        UsageError: the request contradicts itself or is out of range.
    """
    began = time.perf_counter()
    check_request(request)
    packed, notes = _packed(sources, hardware, request, prices)
    candidates = []
    for experts in packed:
        exact = replay_evictions(sources, experts, str(request.memory), progress)
        n_slots, cached = experts.memory.n_slots, None
        if request.max_kl is not None:
            cached = search_cached_replica(sources, experts, n_slots, max_kl=request.max_kl)
        candidates += _candidates(
            sources, request, experts, exact, n_slots, cached, robust=request.robust
        )
    chosen = choose(candidates, max_kl=request.max_kl)
    if chosen is None:
        raise out_of_reach(candidates, sources, request)
    prefetch = _try_prefetch(sources, chosen)
    judged = next((c for c in candidates if c.experts is chosen.experts and c.caches), None)
    plan = make_pack_plan(
        sources, hardware, request, chosen, prefetches=prefetch is not None and prefetch.pays
    )
    return PlanReport(
        plan=plan,
        best=chosen.exact.rows[:3],
        lru=chosen.exact.lru,
        bound=chosen.exact.bound,
        prefetch=prefetch,
        penalties=() if judged is None or judged.caches is None else judged.caches.penalties,
        allocations=chosen.experts.allocations,
        neighbours=tuple(_neighbours(sources, request, chosen)),
        notes=(*notes, *_notes_of_choice(sources, request, chosen, judged, prefetch)),
        seconds=time.perf_counter() - began,
    )


def plan_curve(
    build: Callable[[MemoryRequest], PlanReport], memories: Sequence[MemoryRequest]
) -> tuple[list[PlanReport], list[tuple[str, BudgetError]]]:
    """Return the plans of several budgets, and the refusals of budgets that are too small."""
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
    """Return the allowed precisions that fit, most bits first, and notes on the others."""
    header = sources.profile.header
    if request.is_mixed:
        found = mixed_experts(sources, hardware, request, prices)
        return [found], kept_notes(header, WIDTHS)
    every: tuple[Bits, ...] = ("native", *map(str, useful_widths(header, _AUTO_WIDTHS)))
    if request.bits is not None:
        every = (request.bits,)
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
    notes = [] if is_free else bit_notes(request, losses, tuple(refused))
    return packed, notes if request.bits is not None else notes + kept_notes(header, _AUTO_WIDTHS)


def _candidates(
    sources: PlanSources,
    request: PlanRequest,
    experts: PackedExperts,
    exact: EvictionReplays,
    n_slots: int,
    cached: LossyAnswers | None,
    *,
    robust: float | None,
) -> list[Candidate]:
    """Return the candidates for a number of slots: lossy ones if divergence is limited, `cached`
    among them, and the exact one last."""
    answers = []
    if request.max_kl is not None:
        answers = lossy_answers(sources, experts, n_slots, robust)
    if cached is not None:
        answers.append(cached)
    return [Candidate(experts=experts, exact=exact, lossy=each) for each in (*answers, None)]


def _try_prefetch(sources: PlanSources, chosen: Candidate) -> PrefetchRow | None:
    best = chosen.exact.rows[0]
    if chosen.lossy is not None or chosen.experts.bits == "mixed":
        return None
    if best.hit_rate >= 1 or sources.replayed.trace.n_layers < 2:
        return None
    budget = Budget(label=best.memory, n_slots=best.slots)
    machine = chosen.experts.machine
    return simulate_prefetch(
        sources.replayed, chosen.exact.choice, budget, machine, prefetch="next-layer"
    )


def _notes_of_choice(
    sources: PlanSources,
    request: PlanRequest,
    chosen: Candidate,
    judged: Candidate | None,
    prefetch: PrefetchRow | None,
) -> list[str]:
    if chosen.experts.bits == "mixed":
        return mixed_notes(chosen)
    notes = [] if request.max_kl is None else [limit_note(chosen)]
    if chosen.lossy is not None and chosen.lossy.residents is not None:
        notes.append(robust_note(chosen.lossy.robust, sources.profile.tokens.domains))
    if judged is not None:
        notes.append(caches_note(judged, is_chosen=judged is chosen))
    if chosen.lossy is None:
        notes += [*chosen.exact.notes, eviction_note(chosen)]
    notes += overhead_notes(chosen, len(sources.profile.header.shape.layers))
    return notes if prefetch is None else [*notes, prefetch_note(prefetch)]


def _neighbours(sources: PlanSources, request: PlanRequest, chosen: Candidate) -> list[Neighbour]:
    """Return predictions for other budgets at the same bits and eviction policy or limit; none for
    mixed bits, which depend on the budget."""
    experts = chosen.experts
    if experts.bits == "mixed":
        return []
    record_bytes, budget_bytes = experts.costs.record_bytes, experts.memory.budget_bytes
    fixed = experts.memory.total_bytes - experts.memory.n_slots * record_bytes
    everything = fixed + experts.n_experts * record_bytes
    sizes = {int(budget_bytes * step) for step in _BUDGET_STEPS}
    found = []
    for size in sorted({size for size in sizes if size < everything} | {everything}):
        n_slots = min(experts.n_experts, (size - fixed) // record_bytes)
        if n_slots < experts.machine.n_slots_min or size == budget_bytes:
            continue
        budget = Budget(label=format_bytes(size), n_slots=n_slots)
        other = _elsewhere(sources, request, chosen, budget)
        if other is not None:
            found.append(
                Neighbour(
                    memory_bytes=size,
                    tokens_per_second=other.tokens_per_second,
                    ratio=other.tokens_per_second / chosen.tokens_per_second,
                    kl=None if request.max_kl is None else other.nats_per_token,
                )
            )
    return found


def _elsewhere(
    sources: PlanSources, request: PlanRequest, chosen: Candidate, budget: Budget
) -> Candidate | None:
    """Return the same choice with another number of slots; None if it cannot run in them."""
    experts = chosen.experts
    exact = replay_one(sources, experts, chosen.exact.choice, budget)
    n_slots, cached = budget.n_slots, None
    if chosen.lossy is not None and chosen.caches is not None:
        cached = replay_cached_replica(
            sources, experts, n_slots, policy=chosen.lossy.policy, eviction=chosen.caches.eviction
        )
    found = _candidates(
        sources,
        request,
        experts,
        exact or chosen.exact,
        n_slots,
        cached,
        robust=0.0 if chosen.lossy is None else chosen.lossy.robust,
    )
    if exact is None:
        found.pop()  # the policy cannot work with so few
    return choose(found, max_kl=request.max_kl) if found else None
