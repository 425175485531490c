"""Simulated cost of a trace for every memory budget and eviction policy."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_tool.artifacts.access_trace import AccessTrace, CallCounts
from moe_tool.artifacts.simulation_report import BELADY, PrefetchRow, PromptRow, SimulatedRow
from moe_tool.policies.eviction import EVICTION, EvictionChoice, parse_eviction
from moe_tool.policies.hot_set import n_pinned
from moe_tool.policies.prefetch import parse_prefetch
from moe_tool.progress import SILENT, Progress
from moe_tool.simulator.replay import Replayer
from moe_tool.simulator.time_model import CallCosts, call_times, forward_seconds

_CLOSE_TO_BELADY = 1.25
_MISSES_ANYWAY = 0.3
_SLOWER = 0.98


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Memory budget as a number of expert slots."""

    label: str
    """Budget as the user wrote it"""
    n_slots: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Record size and speeds of a model on a machine."""

    record_bytes: int
    n_slots_min: int
    costs: CallCosts
    hottest: Sequence[int]
    """Keys in order of falling use in the profile"""


def simulate_decoding(
    replayer: Replayer,
    choices: Sequence[EvictionChoice],
    budgets: Sequence[Budget],
    machine: Machine,
    *,
    progress: Progress = SILENT,
) -> tuple[list[SimulatedRow], float]:
    """Return a row per budget and policy, Belady last, and the replayed accesses per second.

    Args:
        replayer: trace with one token per forward.
        budgets: budgets in ascending order.
    """
    trace, rows = replayer.trace, []
    n_replayed, began = 0, time.perf_counter()
    progress.begin("simulate", len(budgets) * (len(choices) + 1), "replays")
    for budget in budgets:
        bound = replayer.belady(budget.n_slots)
        for choice in (*choices, None):
            counts = bound if choice is None else replay_choice(replayer, choice, budget, machine)
            if counts is not None:
                name = BELADY if choice is None else choice.name
                rows.append(_row(trace, counts, bound, budget, name, machine))
                n_replayed += len(trace.keys)
            progress.advance()
    progress.end()
    return rows, n_replayed / max(1e-9, time.perf_counter() - began)


def replay_choice(
    replayer: Replayer,
    choice: EvictionChoice,
    budget: Budget,
    machine: Machine,
    *,
    prefetch_depth: int = 0,
) -> CallCounts | None:
    """Return the counts of one policy at one budget; None if the policy cannot run there."""
    trace = replayer.trace
    count = n_pinned(
        choice.spec.pinned_share,
        n_slots=budget.n_slots,
        n_slots_min=machine.n_slots_min,
        n_experts=trace.n_keys,
    )
    pinned = machine.hottest[:count]
    capacity = min(budget.n_slots, trace.n_keys) - len(pinned)
    if choice.per_layer and capacity < trace.n_layers * (machine.n_slots_min - 1):
        return None  # a layer could not hold one token's experts
    if "scores" in choice.hints and trace.scores is None:
        return None
    return replayer.replay(choice, capacity=capacity, pinned=pinned, prefetch_depth=prefetch_depth)


def simulate_prompts(
    trace: AccessTrace,
    n_tokens: int,
    choices: Sequence[EvictionChoice],
    budgets: Sequence[Budget],
    machine: Machine,
) -> list[PromptRow]:
    """Return the cost of prompts in chunks; the cache carries over from one to the next."""
    replayer, rows = Replayer(trace), []
    for budget in budgets:
        bound = int(replayer.belady(budget.n_slots).hits.sum())
        for choice in choices:
            counts = replay_choice(replayer, choice, budget, machine)
            if counts is None:
                continue
            hits, n = int(counts.hits.sum()), len(trace.keys)
            rows.append(
                PromptRow(
                    memory=budget.label,
                    eviction=choice.name,
                    hit_rate=hits / max(1, n),
                    belady_hit_rate=bound / max(1, n),
                    bytes_per_token=(n - hits) * machine.record_bytes / max(1, n_tokens),
                )
            )
    return rows


def simulate_prefetch(
    replayer: Replayer, choice: EvictionChoice, budget: Budget, machine: Machine, *, prefetch: str
) -> PrefetchRow:
    """Return the effect of a way to prefetch, as `--prefetch` takes it."""
    trace = replayer.trace
    without = replay_choice(replayer, choice, budget, machine)
    depth = parse_prefetch(prefetch).depth
    ahead = replay_choice(replayer, choice, budget, machine, prefetch_depth=depth)
    assert without is not None and ahead is not None
    times, plain = (call_times(trace, counts, machine.costs) for counts in (ahead, without))
    n_read, n_used = int(ahead.prefetches.sum()), int(ahead.prefetch_hits.sum())
    n_saved = int(ahead.hits.sum()) - int(without.hits.sum())
    saved_s = float(plain.stall.sum() - times.stall.sum())
    return PrefetchRow(
        memory=budget.label,
        eviction=choice.name,
        prefetch=prefetch,
        accuracy=n_used / max(1, n_read),
        bytes_per_saved_byte=float(times.prefetched.sum()) / n_saved if n_saved > 0 else None,
        stall_saved_ms=1e3 * saved_s / max(1, trace.n_forwards),
        pays=saved_s > 0.02 * float(plain.total.sum()),
    )


def find_slower(rows: Sequence[SimulatedRow]) -> list[str]:
    """Return a sentence for each case in which a policy is slower than with a smaller budget."""
    sentences, fastest = [], dict[str, SimulatedRow]()
    for row in sorted(rows, key=lambda row: row.slots):
        best = fastest.get(row.eviction)
        if best is not None and row.tokens_per_second < _SLOWER * best.tokens_per_second:
            sentences.append(
                f"{row.eviction} is slower at {row.memory} ({row.tokens_per_second:.2f} tokens/s) "
                f"than at {best.memory} ({best.tokens_per_second:.2f})"
            )
        if best is None or row.tokens_per_second > best.tokens_per_second:
            fastest[row.eviction] = row
    return sentences


def default_choices() -> list[EvictionChoice]:
    """Return every policy with a compiled replay, and LRU and LFU also with a cache per layer."""
    slow = replayed_in_python()
    names = [name for name in EVICTION if name not in slow]
    return [parse_eviction(name) for name in (*names, "lru:per-layer", "lfu:per-layer")]


def replayed_in_python() -> list[str]:
    """Return the policies whose replay takes a thousand times as long as a compiled one."""
    return [name for name, spec in EVICTION.items() if spec.compiled is None]


def _row(
    trace: AccessTrace,
    counts: CallCounts,
    bound: CallCounts,
    budget: Budget,
    name: str,
    machine: Machine,
) -> SimulatedRow:
    times = call_times(trace, counts, machine.costs)
    seconds = forward_seconds(trace, times, machine.costs)
    n, n_tokens = max(1, len(trace.keys)), max(1, trace.n_forwards)
    misses = n - int(counts.hits.sum())
    bound_misses = n - int(bound.hits.sum())
    median, slow = np.percentile(seconds, [50, 99]) if len(seconds) else (0.0, 0.0)
    return SimulatedRow(
        memory=budget.label,
        slots=budget.n_slots,
        expert_bytes=budget.n_slots * machine.record_bytes,
        eviction=name,
        hit_rate=1 - misses / n,
        bytes_per_token=misses * machine.record_bytes / n_tokens,
        stall_ms=1e3 * float(times.stall.sum()) / n_tokens,
        tokens_per_second=len(seconds) / float(seconds.sum()) if len(seconds) else 0.0,
        p50_ms=1e3 * float(median),
        p99_ms=1e3 * float(slow),
        belady_hit_rate=1 - bound_misses / n,
        # Pinned experts are in memory before the first token, so there may be fewer misses.
        to_belady=misses / bound_misses if bound_misses and misses >= bound_misses else None,
        limited_by=_limit(misses / n, bound_misses / n, budget.n_slots < trace.cycle),
    )


def _limit(miss_rate: float, bound: float, is_below_cycle: bool) -> str:
    """Return the limiting factor: the budget below one token's working set; else the policy if
    Belady misses clearly less, or the working set if even Belady misses often."""
    if is_below_cycle:
        return "budget"
    if miss_rate > _CLOSE_TO_BELADY * bound and miss_rate - bound > 0.02:
        return "policy"
    return "working set" if bound > _MISSES_ANYWAY else "-"
