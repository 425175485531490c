"""The best plan for a memory budget: every way of running is replayed, the fastest is taken."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moe_tool import __version__
from moe_tool.artifacts.hardware_profile import HardwareProfile
from moe_tool.artifacts.pack_plan import Bits, PackPlan, PlanLine, PlanPrediction
from moe_tool.artifacts.simulation_report import BELADY, PrefetchRow, SimulatedRow
from moe_tool.budget.request import MemoryRequest
from moe_tool.budget.sizes import format_bytes
from moe_tool.errors import BudgetError, UsageError
from moe_tool.planning.bit_price import predicted_loss
from moe_tool.planning.choose_lossy import (
    LimitedChoice,
    choices_at,
    choose_within,
    fastest_choice,
    limit_note,
    planned_forms,
)
from moe_tool.planning.first_token import seconds_to_first_token
from moe_tool.planning.plan_request import PlanRequest
from moe_tool.planning.plan_sources import PlanSources
from moe_tool.planning.profile_prices import nats_of_bits
from moe_tool.planning.ways_to_run import WayToRun, replay_ways
from moe_tool.policies.eviction import parse_eviction
from moe_tool.progress import SILENT, Progress
from moe_tool.simulator.simulate import (
    Budget,
    simulate_decoding,
    simulate_prefetch,
)

PREDICTION_ERROR = 0.4
"""Relative, of tokens per second: what benchmarks/prediction_error.py found on a shared machine"""
FIRST_PROMPT_TOKENS = 512
_MAX_CONTEXT = 2**31
_MAX_KL = 100
_AS_FAST = 0.98
"""More bits are taken where they are so nearly as fast as fewer"""
_MOSTLY_FIXED = 0.5
_BUDGET_STEPS = (0.5, 0.75, 1.25, 1.5, 2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbour:
    """Another budget."""

    memory_bytes: int
    tokens_per_second: float
    ratio: float
    """To the planned one"""
    kl: float | None
    """Expected; None where misses are answered exactly"""


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


def build_plan(
    sources: PlanSources,
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
    if request.max_kl is not None and not 0 <= request.max_kl < _MAX_KL:
        raise UsageError(f"--max-kl {request.max_kl:.4g}: not possible", hint="--max-kl 0.01")
    losses = {bits: predicted_loss(sources.statistics, bits) for bits in _all_bits(request)}
    is_free = request.bits is not None or request.max_kl is not None
    allowed: list[Bits] = [bits for bits in losses if is_free or losses[bits] <= request.max_loss]
    options, refusal = [], None
    for bits in allowed:
        try:
            options.append(replay_ways(sources, hardware, request, bits, progress))
        except BudgetError as error:
            refusal = error
    if not options:
        assert refusal is not None
        raise refusal
    limited = None if request.max_kl is None else choose_within(sources, options, request)
    chosen = _fastest(options) if limited is None else limited.way
    best = chosen.rows[0]
    is_lossy = limited is not None and limited.lossy is not None
    notes = _bit_notes(request, losses, options, refusal)
    if limited is not None:
        notes.append(limit_note(limited))
    if not is_lossy:
        notes += [*chosen.notes, _why(chosen)]
    notes += _fixed_time_notes(chosen, len(sources.profile.header.shape.layers))
    prefetch = None if is_lossy else _try_prefetch(sources, chosen, best)
    if prefetch is not None:
        notes.append(_prefetch_note(prefetch))
    plan = _plan(sources, hardware, request, chosen, losses, prefetch)
    if limited is not None:
        plan = _under_limit(plan, sources, request, limited)
    return PlanReport(
        plan=plan,
        best=tuple(chosen.rows[:3]),
        lru=chosen.lru,
        bound=chosen.bound,
        prefetch=prefetch,
        neighbours=tuple(_neighbours(sources, request, chosen, plan)),
        notes=tuple(notes),
        seconds=time.perf_counter() - began,
    )


def _fastest(options: Sequence[WayToRun]) -> WayToRun:
    """The fastest; of those that are nearly as fast the one with most bits, which come first."""
    fastest = max(option.rows[0].tokens_per_second for option in options)
    return next(
        option for option in options if option.rows[0].tokens_per_second >= _AS_FAST * fastest
    )


def _under_limit(
    plan: PackPlan, sources: PlanSources, request: PlanRequest, limited: LimitedChoice
) -> PackPlan:
    """The plan with what a limit of divergence adds to it."""
    prediction, lossy = plan.prediction, limited.lossy
    kl = {"kl": limited.nats_per_token, "kl_of_bits": limited.nats_of_bits}
    if lossy is None:
        return plan.model_copy(update={"prediction": prediction.model_copy(update=kl)})
    replayed = lossy.replayed
    predicted = {
        "tokens_per_second": lossy.tokens_per_second,
        "hit_rate": replayed.hit_rate,
        "bytes_per_token": replayed.bytes_per_token,
        "to_belady": None,
    }
    return plan.model_copy(
        update={
            "policy": lossy.policy,
            "replicas": lossy.replicas,
            "max_kl": request.max_kl,
            "forms": planned_forms(sources, lossy),
            "prediction": prediction.model_copy(update=kl | predicted),
        }
    )


def _why(option: WayToRun) -> str:
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


def _fixed_time_notes(option: WayToRun, n_layers: int) -> list[str]:
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


def _bit_notes(
    request: PlanRequest,
    losses: dict[Bits, float],
    options: Sequence[WayToRun],
    refusal: BudgetError | None,
) -> list[str]:
    if request.bits is not None or request.max_kl is not None:
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


def _try_prefetch(sources: PlanSources, option: WayToRun, best: SimulatedRow) -> PrefetchRow | None:
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
    sources: PlanSources,
    hardware: HardwareProfile,
    request: PlanRequest,
    option: WayToRun,
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
        n_tokens=FIRST_PROMPT_TOKENS,
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
            prompt_tokens=FIRST_PROMPT_TOKENS,
            expert_slots=best.slots,
            loss=losses[option.bits],
        ),
        lines=tuple(
            PlanLine(name=line.name, size_bytes=line.size_bytes) for line in option.memory.lines
        ),
    )


def _neighbours(
    sources: PlanSources, request: PlanRequest, option: WayToRun, plan: PackPlan
) -> list[Neighbour]:
    """What other budgets would give at the same bits, under the same eviction or limit."""
    shape = sources.profile.header.shape
    n_experts = shape.experts * len(shape.layers)
    fixed = option.memory.total_bytes - option.memory.n_slots * option.costs.record_bytes
    budget_bytes = option.memory.budget_bytes
    everything = fixed + n_experts * option.costs.record_bytes
    sizes = {int(budget_bytes * step) for step in _BUDGET_STEPS}
    found = []
    for size in sorted({size for size in sizes if size < everything} | {everything}):
        n_slots = min(n_experts, (size - fixed) // option.costs.record_bytes)
        if n_slots < option.machine.n_slots_min or size == budget_bytes:
            continue
        speed, kl = _elsewhere(sources, request, option, format_bytes(size), n_slots)
        if speed is not None:
            ratio = speed / plan.prediction.tokens_per_second
            found.append(Neighbour(memory_bytes=size, tokens_per_second=speed, ratio=ratio, kl=kl))
    return found


def _elsewhere(
    sources: PlanSources, request: PlanRequest, option: WayToRun, label: str, n_slots: int
) -> tuple[float | None, float | None]:
    """Tokens per second and expected divergence with another number of slots."""
    budget = Budget(label=label, n_slots=n_slots)
    choice = parse_eviction(option.rows[0].eviction)
    rows, _ = simulate_decoding(sources.replayed, [choice], [budget], option.machine)
    exact = next((row.tokens_per_second for row in rows if row.eviction != BELADY), None)
    if request.max_kl is None:
        return exact, None
    kept = [
        each
        for each in choices_at(sources, option, n_slots)
        if each.lossy is not None and each.nats_per_token <= request.max_kl
    ]
    if kept and (exact is None or fastest_choice(kept).tokens_per_second > exact):
        best = fastest_choice(kept)
        return best.tokens_per_second, best.nats_per_token
    return exact, nats_of_bits(sources, option.bits)


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
