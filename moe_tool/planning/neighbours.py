"""Smaller and larger budgets at the same bits: the curve around a plan."""

from dataclasses import dataclass

from moe_tool.budget.sizes import format_bytes
from moe_tool.planning.candidate import Candidate
from moe_tool.planning.choose import choose
from moe_tool.planning.eviction_replays import replay_one
from moe_tool.planning.lossy_answers import lossy_answers
from moe_tool.planning.plan_request import PlanRequest
from moe_tool.planning.plan_sources import PlanSources
from moe_tool.simulator.simulate import Budget

_BUDGET_STEPS = (0.5, 0.75, 1.25, 1.5, 2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbour:
    """Another budget."""

    memory_bytes: int
    tokens_per_second: float
    ratio: float
    """Speed over that of the plan"""
    kl: float | None
    """Expected divergence; None where misses are answered exactly"""


def neighbours(sources: PlanSources, request: PlanRequest, chosen: Candidate) -> list[Neighbour]:
    """Return what other budgets would give at the same bits, under the same eviction or limit;
    nothing for mixed bits, which another budget would hand out otherwise.

    Args:
        sources: of the profile.
        request: budget and limits.
        chosen: the planned candidate.
    """
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
    """Return the same choice with another number of slots; None where nothing runs in them."""
    experts, eviction = chosen.experts, chosen.exact.rows[0].eviction
    answers = []
    if request.max_kl is not None:
        answers = lossy_answers(sources, experts, budget.n_slots)
    exact = replay_one(sources, experts, eviction, budget)
    found = [
        Candidate(experts=experts, exact=exact or chosen.exact, lossy=each) for each in answers
    ]
    if exact is not None:
        found.append(Candidate(experts=experts, exact=exact))
    return choose(found, max_kl=request.max_kl) if found else None
