"""Every way of running at one precision of the experts and one budget, replayed and ranked."""

from dataclasses import dataclass, replace

from moe_tool.artifacts.expert_ids import LayerIds
from moe_tool.artifacts.hardware_profile import HardwareProfile
from moe_tool.artifacts.pack_plan import Bits
from moe_tool.artifacts.simulation_report import BELADY, SimulatedRow
from moe_tool.budget.account import MemoryPlan
from moe_tool.budget.slots import min_slots
from moe_tool.planning.memory_account import account
from moe_tool.planning.model_costs import ModelCosts, model_costs
from moe_tool.planning.pinning import check_pins
from moe_tool.planning.plan_request import PlanRequest
from moe_tool.planning.plan_sources import PlanSources
from moe_tool.policies.eviction import EvictionChoice, parse_eviction
from moe_tool.policies.hot_set import n_pinned
from moe_tool.progress import Progress
from moe_tool.simulator.simulate import (
    Budget,
    Machine,
    replay_choice,
    simulate_decoding,
)

_SIMPLE_FIRST = 0.99
"""A policy has to read so much less than one named before it"""
_CANDIDATES = (
    "lru",
    "layer-lru",
    "lfu",
    "lfu:halve-every=512",
    "s3-fifo",
    "pinned+lru",
    "static-hot",
    "lru:per-layer",
    "lfu:per-layer",
)
_HOBBIT_MIXES = ((70, 0, 30), (45, 35, 20), (20, 70, 10), (20, 40, 40), (10, 20, 70), (0, 80, 20))
"""Percent of recency, frequency and layer distance; frequency counts once, since every use is one
at high precision"""


@dataclass(frozen=True, slots=True, kw_only=True)
class WayToRun:
    """One precision of the experts at one budget."""

    bits: Bits
    memory: MemoryPlan
    costs: ModelCosts
    machine: Machine
    rows: list[SimulatedRow]
    """Those that read least first, which are the fastest; the bound left out"""
    lru: SimulatedRow
    bound: SimulatedRow
    notes: list[str]


def replay_ways(
    sources: PlanSources,
    hardware: HardwareProfile,
    request: PlanRequest,
    bits: Bits,
    progress: Progress,
) -> WayToRun:
    shape = sources.profile.header.shape
    memory = account(
        request.memory,
        shape,
        sources.skeleton,
        bits=bits,
        skeleton_bits=request.skeleton_bits,
        context=request.context,
    )
    costs = model_costs(
        shape, sources.skeleton, hardware, bits=bits, skeleton_bits=request.skeleton_bits
    )
    ids = LayerIds(shape.layers, shape.experts)
    n_experts = shape.experts * len(shape.layers)
    machine = Machine(
        record_bytes=costs.record_bytes,
        n_slots_min=min_slots(shape.top_k, n_experts),
        costs=costs.calls,
        hottest=[ids.number(key) for key in sources.ranked],
    )
    budget = Budget(label=str(request.memory), n_slots=memory.n_slots)
    choices, notes = _choices(sources, machine, budget, n_experts)
    rows, _ = simulate_decoding(sources.replayed, choices, [budget], machine, progress=progress)
    if memory.n_slots >= n_experts:
        rows = [_once_filled(row) for row in rows]
    bound = next(row for row in rows if row.eviction == BELADY)
    lru = next(row for row in rows if row.eviction == "lru")
    ranked: list[SimulatedRow] = []
    for row in rows:  # in the order of the candidates: simple ones first
        if row.eviction == BELADY:
            continue
        at = next(
            (
                i
                for i, other in enumerate(ranked)
                if row.bytes_per_token < _SIMPLE_FIRST * other.bytes_per_token
            ),
            len(ranked),
        )
        ranked.insert(at, row)
    return WayToRun(
        bits=bits,
        memory=memory,
        costs=costs,
        machine=machine,
        rows=ranked,
        lru=lru,
        bound=bound,
        notes=notes,
    )


def _once_filled(row: SimulatedRow) -> SimulatedRow:
    """Where every expert stays, without the one read of each, which no token after it repeats."""
    return replace(row, hit_rate=1.0, bytes_per_token=0.0, belady_hit_rate=1.0, to_belady=None)


def _choices(
    sources: PlanSources, machine: Machine, budget: Budget, n_experts: int
) -> tuple[list[EvictionChoice], list[str]]:
    """The policies that may be planned, and why others may not."""
    if budget.n_slots >= n_experts:
        return [parse_eviction("lru")], ["every expert stays in memory: nothing is ever evicted"]
    notes, names = [], list(_CANDIDATES)
    for share, name in ((1.0, "static-hot"), (0.5, "pinned+lru")):
        count = n_pinned(
            share, n_slots=budget.n_slots, n_slots_min=machine.n_slots_min, n_experts=n_experts
        )
        if count == 0:
            names.remove(name)
            continue
        refusal = check_pins(sources.statistics, sources.ranked, count).refusal
        if refusal is not None:
            names.remove(name)
            notes.append(f"no {name}: {refusal}")
    names.append(_best_hobbit(sources, machine, budget))
    return [parse_eviction(name) for name in names], notes


def _best_hobbit(sources: PlanSources, machine: Machine, budget: Budget) -> str:
    """Its weights as the paper has it: those that miss least on the calibration trace."""

    def hits(mix: tuple[int, int, int]) -> int:
        counts = replay_choice(sources.searched, parse_eviction(_hobbit(mix)), budget, machine)
        return 0 if counts is None else int(counts.hits.sum())

    return _hobbit(max(_HOBBIT_MIXES, key=hits))


def _hobbit(mix: tuple[int, int, int]) -> str:
    return f"hobbit:lru={mix[0]},lfu={mix[1]},lhu=0,fld={mix[2]}"
