"""Replay and ranking of the eviction policies that a plan may use, at one precision and budget."""

from dataclasses import replace

from moe_tool.artifacts.simulation_report import BELADY, SimulatedRow
from moe_tool.planning.candidate import EvictionReplays, PackedExperts
from moe_tool.planning.hobbit_weights import search_hobbit_weights
from moe_tool.planning.pinning import refuse_pins
from moe_tool.planning.plan_sources import PlanSources
from moe_tool.policies.eviction import DEFAULT_EVICTION, EvictionChoice, parse_eviction
from moe_tool.policies.hot_set import n_pinned
from moe_tool.progress import Progress
from moe_tool.simulator.simulate import Budget, Machine, replay_choice, simulate_decoding

_SIMPLE_FIRST = 0.99
"""Share of an earlier policy's bytes below which a later one ranks first"""
_CANDIDATES = (
    DEFAULT_EVICTION,
    parse_eviction("layer-lru"),
    parse_eviction("lfu"),
    parse_eviction("lfu:halve-every=512"),
    parse_eviction("s3-fifo"),
    parse_eviction("pinned+lru"),
    parse_eviction("static-hot"),
    parse_eviction("lru:per-layer"),
    parse_eviction("lfu:per-layer"),
)


def replay_evictions(
    sources: PlanSources, experts: PackedExperts, label: str, progress: Progress
) -> EvictionReplays:
    """Return decoding under every eviction policy that fits the budget, ranked by bytes read.

    Experts of mixed widths are replayed under lru alone: one pool per width is not simulated.
    """
    budget = Budget(label=label, n_slots=experts.replayed_slots)
    choices, notes = _choices(sources, experts, budget)
    rows, _ = simulate_decoding(
        sources.replayed, choices, [budget], experts.machine, progress=progress
    )
    if experts.is_resident:
        rows = [_once_filled(row) for row in rows]
    return _rank(rows, choices, notes)


def replay_one(
    sources: PlanSources, experts: PackedExperts, choice: EvictionChoice, budget: Budget
) -> EvictionReplays | None:
    """Return decoding under one eviction policy at another number of slots; None if there are too
    few for it."""
    rows, _ = simulate_decoding(sources.replayed, [choice], [budget], experts.machine)
    if all(row.eviction == BELADY for row in rows):
        return None
    return _rank(rows, [choice], [])


def _rank(
    rows: list[SimulatedRow], choices: list[EvictionChoice], notes: list[str]
) -> EvictionReplays:
    """Rank rows, the bound among them, by bytes read; a later row has to read noticeably less than
    an earlier one."""
    bound = next(row for row in rows if row.eviction == BELADY)
    ranked: list[SimulatedRow] = []
    for row in rows:
        if row.eviction == BELADY:
            continue
        limits = (_SIMPLE_FIRST * other.bytes_per_token for other in ranked)
        worse = (at for at, limit in enumerate(limits) if row.bytes_per_token < limit)
        ranked.insert(next(worse, len(ranked)), row)
    choice = next(each for each in choices if each.name == ranked[0].eviction)
    lru = next((row for row in ranked if row.eviction == DEFAULT_EVICTION.name), ranked[0])
    return EvictionReplays(
        rows=tuple(ranked), choice=choice, lru=lru, bound=bound, notes=tuple(notes)
    )


def _once_filled(row: SimulatedRow) -> SimulatedRow:
    """Return the steady state where everything fits; the initial load is left out."""
    return replace(row, hit_rate=1.0, bytes_per_token=0.0, belady_hit_rate=1.0, to_belady=None)


def _choices(
    sources: PlanSources, experts: PackedExperts, budget: Budget
) -> tuple[list[EvictionChoice], list[str]]:
    """Return the policies that a plan may use, and notes on the others."""
    plain, machine = [DEFAULT_EVICTION], experts.machine
    if experts.bits == "mixed":
        return plain, []
    if experts.is_resident:
        return plain, ["every expert stays in memory: nothing is ever evicted"]
    choices: list[EvictionChoice] = []
    notes: list[str] = []
    for choice in _CANDIDATES:
        if choice.spec.pinned_share:
            count = n_pinned(
                choice.spec.pinned_share,
                n_slots=budget.n_slots,
                n_slots_min=machine.n_slots_min,
                n_experts=experts.n_experts,
            )
            if count == 0:
                continue
            refusal = refuse_pins(sources.statistics, sources.ranked, count)
            if refusal is not None:
                notes.append(f"no {choice.name}: {refusal}")
                continue
        choices.append(choice)
    choices.append(_best_hobbit(sources, machine, budget))
    return choices, notes


def _best_hobbit(sources: PlanSources, machine: Machine, budget: Budget) -> EvictionChoice:
    """Return HOBBIT with the weights that miss least on the in-sample trace, as in the paper."""

    def misses(choice: EvictionChoice) -> float:
        counts = replay_choice(sources.searched, choice, budget, machine)
        return 0.0 if counts is None else -float(counts.hits.sum())

    return search_hobbit_weights(misses, has_cheaper=False)
