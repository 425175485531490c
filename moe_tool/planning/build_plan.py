"""The best plan for a memory budget: every way of running is replayed, the fastest is taken."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from moe_tool import __version__
from moe_tool.artifacts.expert_statistics import ExpertStatistics
from moe_tool.artifacts.hardware_profile import HardwareProfile
from moe_tool.artifacts.pack_plan import Bits, PackPlan, PlanLine, PlanPrediction
from moe_tool.artifacts.skeleton_facts import SkeletonFacts
from moe_tool.byte_sizes import format_bytes
from moe_tool.errors import ArtifactVersionError, BudgetError, UsageError
from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.planning.bit_price import predicted_loss
from moe_tool.planning.first_token import seconds_to_first_token
from moe_tool.planning.memory_account import account
from moe_tool.planning.model_costs import ModelCosts, model_costs
from moe_tool.planning.pinning import check_pins, rank_experts
from moe_tool.policies.eviction import EvictionChoice, parse_eviction
from moe_tool.policies.hot_set import n_pinned
from moe_tool.progress import SILENT, Progress
from moe_tool.runtime.memory_plan import MemoryPlan
from moe_tool.simulator.access_trace import AccessTrace
from moe_tool.simulator.profile_trace import decode_trace, part_to_replay, prompt_trace
from moe_tool.simulator.replay import Replayer
from moe_tool.simulator.simulate import (
    BELADY,
    Budget,
    Machine,
    PrefetchRow,
    SimulatedRow,
    replay_choice,
    simulate_decoding,
    simulate_prefetch,
)

PREDICTION_ERROR = 0.4
"""Relative, of tokens per second: what benchmarks/prediction_error.py found on a shared machine"""
_FIRST_PROMPT_TOKENS = 512
_MAX_CONTEXT = 2**31
_MAX_ACCESSES = 500_000
_MAX_SEARCH_ACCESSES = 200_000
_SIMPLE_FIRST = 0.99
"""A policy has to read so much less than one named before it"""
_AS_FAST = 0.98
"""More bits are taken where they are so nearly as fast as fewer"""
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
_MOSTLY_FIXED = 0.5
_BUDGET_STEPS = (0.5, 0.75, 1.25, 1.5, 2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What is to be planned for."""

    memory: str
    bits: Bits | None = None
    """None: the fastest whose predicted loss is allowed"""
    skeleton_bits: Bits = "native"
    max_loss: float = 0.01
    """Perplexity that fewer bits may add, as a share"""
    context: int = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbour:
    """Another budget."""

    memory_bytes: int
    tokens_per_second: float
    ratio: float
    """To the planned one"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """A plan, and what it was chosen from."""

    plan: PackPlan
    best: tuple[SimulatedRow, ...]
    """The three that read least, the chosen one first; fewer where fewer were replayed"""
    lru: SimulatedRow
    bound: SimulatedRow
    prefetch: PrefetchRow | None
    neighbours: tuple[Neighbour, ...]
    """Smaller and larger budgets, ascending; the last holds every expert"""
    notes: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sources:
    """All that a profile says to a planner."""

    profile: ProfileReader
    skeleton: SkeletonFacts
    statistics: dict[int, ExpertStatistics]
    ranked: list[tuple[int, int]]
    replayed: Replayer
    searched: Replayer
    prompts: tuple[AccessTrace, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Option:
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


def read_sources(profile: ProfileReader) -> _Sources:
    """Return what planning needs of a profile, for any number of budgets.

    Raises:
        ArtifactVersionError: the profile was recorded before it said what the model has beside its
            experts.
        CorruptArtifactError: it is damaged.
    """
    skeleton = profile.header.skeleton
    if skeleton is None:
        raise ArtifactVersionError(
            f"{profile.path} does not say what the model has beside its experts",
            hint="record it again with moe-tool profile",
        )
    shape = profile.header.shape
    per_token = len(shape.layers) * shape.top_k
    statistics = {layer: profile.statistics(layer) for layer in shape.layers}
    part = part_to_replay(profile)
    return _Sources(
        profile=profile,
        skeleton=skeleton,
        statistics=statistics,
        ranked=rank_experts(statistics),
        replayed=Replayer(
            decode_trace(
                profile, part, max_tokens=max(1, _MAX_ACCESSES // per_token), with_guesses=True
            )
        ),
        searched=Replayer(
            decode_trace(profile, "in-sample", max_tokens=max(1, _MAX_SEARCH_ACCESSES // per_token))
        ),
        prompts=prompt_trace(profile, part),
    )


def build_plan(
    sources: _Sources,
    hardware: HardwareProfile,
    request: PlanRequest,
    *,
    progress: Progress = SILENT,
) -> PlanReport:
    """Return the fastest plan that keeps the budget.

    Args:
        sources: of `read_sources`.
        hardware: the machine that it is for.
        request: budget and limits.
        progress: told about the steps.

    Raises:
        BudgetError: no precision that is allowed fits: with the least that works.
        UsageError: a number that means nothing.
    """
    began = time.perf_counter()
    if not 0 <= request.max_loss < 100 or not 1 <= request.context <= _MAX_CONTEXT:
        raise UsageError(
            f"--max-loss {request.max_loss:.4g}, --context {request.context}: not possible",
            hint="--max-loss 1% --context 4096",
        )
    losses = {bits: predicted_loss(sources.statistics, bits) for bits in _all_bits(request)}
    allowed: list[Bits] = [
        bits for bits in losses if request.bits or losses[bits] <= request.max_loss
    ]
    options, refusal = [], None
    for bits in allowed:
        try:
            options.append(_evaluate(sources, hardware, request, bits, progress))
        except BudgetError as error:
            refusal = error
    if not options:
        assert refusal is not None
        raise refusal
    fastest = max(option.rows[0].tokens_per_second for option in options)
    # The options descend in bits.
    chosen = next(
        option for option in options if option.rows[0].tokens_per_second >= _AS_FAST * fastest
    )
    best = chosen.rows[0]
    notes = [
        *_bit_notes(request, losses, options, refusal),
        *chosen.notes,
        _why(chosen),
        *_fixed_time_notes(chosen, len(sources.profile.header.shape.layers)),
    ]
    prefetch = _try_prefetch(sources, chosen, best)
    if prefetch is not None:
        notes.append(_prefetch_note(prefetch))
    plan = _plan(sources, hardware, request, chosen, losses, prefetch)
    return PlanReport(
        plan=plan,
        best=tuple(chosen.rows[:3]),
        lru=chosen.lru,
        bound=chosen.bound,
        prefetch=prefetch,
        neighbours=tuple(_neighbours(sources, request, chosen, best)),
        notes=tuple(notes),
        seconds=time.perf_counter() - began,
    )


def _why(option: _Option) -> str:
    """What speaks for the policy that was taken."""
    best, lru, bound = option.rows[0], option.lru, option.bound
    if not lru.bytes_per_token:
        return f"eviction {best.eviction}: nothing is read once the cache is full"
    share = 1 - best.bytes_per_token / lru.bytes_per_token
    less = "as much as lru" if abs(share) < 0.005 else f"{share:.0%} less than lru"
    over = ""
    if bound.bytes_per_token:
        over = f", {best.bytes_per_token / bound.bytes_per_token:.2f} times the bound"
    behind = "; ".join(
        f"{row.eviction} {row.bytes_per_token / best.bytes_per_token:.2f} times as much"
        for row in option.rows[1:3]
        if best.bytes_per_token
    )
    return f"eviction {best.eviction}: reads {less}{over}" + (f"; {behind}" if behind else "")


def _fixed_time_notes(option: _Option, n_layers: int) -> list[str]:
    """That `PREDICTION_ERROR`, which was found on larger models, does not hold for a tiny one."""
    costs = option.machine.costs
    share = n_layers * costs.layer_s * option.rows[0].tokens_per_second
    if share < _MOSTLY_FIXED:
        return []
    return [
        f"a tiny model: {min(share, 1.0):.0%} of a token's time is Python between its matrices, "
        f"which the load of the machine changes by more than {PREDICTION_ERROR:.0%}"
    ]


def _all_bits(request: PlanRequest) -> tuple[Bits, ...]:
    return ("native", "8", "4") if request.bits is None else (request.bits,)


def _evaluate(
    sources: _Sources,
    hardware: HardwareProfile,
    request: PlanRequest,
    bits: Bits,
    progress: Progress,
) -> _Option:
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
    positions = {layer: at for at, layer in enumerate(shape.layers)}
    n_experts = shape.experts * len(shape.layers)
    machine = Machine(
        record_bytes=costs.record_bytes,
        n_slots_min=min(shape.top_k + 1, n_experts),
        costs=costs.calls,
        hottest=[positions[layer] * shape.experts + expert for layer, expert in sources.ranked],
    )
    budget = Budget(label=request.memory, n_slots=memory.n_slots)
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
    return _Option(
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
    sources: _Sources, machine: Machine, budget: Budget, n_experts: int
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


def _best_hobbit(sources: _Sources, machine: Machine, budget: Budget) -> str:
    """Its weights as the paper has it: those that miss least on the calibration trace."""

    def hits(mix: tuple[int, int, int]) -> int:
        counts = replay_choice(sources.searched, parse_eviction(_hobbit(mix)), budget, machine)
        return 0 if counts is None else int(counts.hits.sum())

    return _hobbit(max(_HOBBIT_MIXES, key=hits))


def _hobbit(mix: tuple[int, int, int]) -> str:
    return f"hobbit:lru={mix[0]},lfu={mix[1]},lhu=0,fld={mix[2]}"


def _bit_notes(
    request: PlanRequest,
    losses: dict[Bits, float],
    options: Sequence[_Option],
    refusal: BudgetError | None,
) -> list[str]:
    if request.bits is not None:
        return []
    notes = [
        f"{bits} bits: predicted to add {loss:.1%} perplexity, {request.max_loss:.1%} are allowed"
        for bits, loss in losses.items()
        if loss > request.max_loss
    ]
    if refusal is not None and len(options) + len(notes) < len(losses):
        known = {option.bits for option in options}
        unfit = [b for b, loss in losses.items() if b not in known and loss <= request.max_loss]
        notes.append(f"{', '.join(unfit)}: does not fit into {request.memory}")
    return notes


def _try_prefetch(sources: _Sources, option: _Option, best: SimulatedRow) -> PrefetchRow | None:
    if best.hit_rate >= 1 or sources.replayed.trace.n_layers < 2:
        return None
    budget = Budget(label=best.memory, n_slots=best.slots)
    choice = parse_eviction(best.eviction)
    return simulate_prefetch(sources.replayed, choice, budget, option.machine, depth=1)


def _prefetch_note(row: PrefetchRow) -> str:
    per_byte = row.bytes_per_saved_byte
    cost = "saves no byte" if per_byte is None else f"reads {per_byte:.1f} bytes per byte saved"
    verdict = "pays" if row.pays else "does not pay"
    change = "less" if row.stall_saved_ms >= 0 else "more"
    return (
        f"prefetch {verdict}: {row.accuracy:.0%} of what next-layer names is wanted, it {cost}, "
        f"{abs(row.stall_saved_ms):.2f} ms {change} stall per token"
    )


def _plan(
    sources: _Sources,
    hardware: HardwareProfile,
    request: PlanRequest,
    option: _Option,
    losses: dict[Bits, float],
    prefetch: PrefetchRow | None,
) -> PackPlan:
    header, best = sources.profile.header, option.rows[0]
    budget = Budget(label=best.memory, n_slots=best.slots)
    choice = parse_eviction(best.eviction)
    first_token_s = seconds_to_first_token(
        sources.prompts,
        choice,
        budget,
        option.machine,
        option.costs,
        hardware,
        shape=header.shape,
        bits=option.bits,
        skeleton_bits=request.skeleton_bits,
        n_tokens=_FIRST_PROMPT_TOKENS,
    )
    return PackPlan(
        tool_version=__version__,
        identity=header.identity,
        profile_sha256=sources.profile.sha256,
        hardware=hardware.name,
        memory_bytes=option.memory.budget_bytes,
        context=request.context,
        bits=option.bits,
        skeleton_bits=request.skeleton_bits,
        eviction=best.eviction,
        prefetch="next-layer" if prefetch is not None and prefetch.pays else "none",
        prediction=PlanPrediction(
            tokens_per_second=best.tokens_per_second,
            error=PREDICTION_ERROR,
            hit_rate=best.hit_rate,
            bytes_per_token=best.bytes_per_token,
            to_belady=best.to_belady,
            seconds_to_first_token=first_token_s,
            prompt_tokens=_FIRST_PROMPT_TOKENS,
            expert_slots=best.slots,
            loss=losses[option.bits],
        ),
        lines=tuple(
            PlanLine(name=line.name, size_bytes=line.size_bytes) for line in option.memory.lines
        ),
    )


def _neighbours(
    sources: _Sources, request: PlanRequest, option: _Option, best: SimulatedRow
) -> list[Neighbour]:
    """What other budgets would give under the same policy."""
    shape = sources.profile.header.shape
    n_experts = shape.experts * len(shape.layers)
    fixed = option.memory.total_bytes - option.memory.n_slots * option.costs.record_bytes
    budget_bytes = option.memory.budget_bytes
    everything = fixed + n_experts * option.costs.record_bytes
    sizes = {int(budget_bytes * step) for step in _BUDGET_STEPS}
    found, choice = [], parse_eviction(best.eviction)
    for size in sorted({size for size in sizes if size < everything} | {everything}):
        n_slots = min(n_experts, (size - fixed) // option.costs.record_bytes)
        if n_slots < option.machine.n_slots_min or size == budget_bytes:
            continue
        budget = Budget(label=format_bytes(size), n_slots=n_slots)
        rows, _ = simulate_decoding(sources.replayed, [choice], [budget], option.machine)
        own = [row for row in rows if row.eviction != BELADY]
        if own:
            speed = own[0].tokens_per_second
            found.append(
                Neighbour(
                    memory_bytes=size,
                    tokens_per_second=speed,
                    ratio=speed / best.tokens_per_second,
                )
            )
    return found


def plan_curve(
    build: Callable[[str], PlanReport], memories: Sequence[str]
) -> tuple[list[PlanReport], list[tuple[str, BudgetError]]]:
    """Return the plans of several budgets, and the refusals of those that are too small."""
    reports, refused = [], []
    for memory in memories:
        try:
            reports.append(build(memory))
        except BudgetError as error:
            refused.append((memory, error))
    return reports, refused
