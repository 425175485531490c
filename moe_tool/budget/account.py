"""Account of a process in memory, line by line, with the expert slots that a budget buys."""

import math
from dataclasses import dataclass

from moe_tool.budget.refusal import MemoryLine, lacks_memory, require_budget, sum_lines
from moe_tool.budget.request import MemoryRequest
from moe_tool.budget.slots import ExpertRoom, bytes_of_slots, slots_within, split_slots

MARGIN_BYTES = 24 * 2**20
"""Holes in the heap, reader threads, Python objects that come and go"""
_AUTO_MARGIN_SHARE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Account of a run that keeps its budget."""

    lines: tuple[MemoryLine, ...]
    """Everything fixed, then the expert slots; their sum is `total_bytes`"""
    slots: tuple[int, ...]
    """Expert records in memory by record size, one pool each for all layers"""
    budget_bytes: int
    """Most that the process may hold; at least `total_bytes`"""

    @property
    def n_slots(self) -> int:
        """Expert records in memory."""
        return sum(self.slots)

    @property
    def total_bytes(self) -> int:
        """Sum of the lines in bytes."""
        return sum_lines(self.lines)


def plan_memory(
    request: MemoryRequest,
    *,
    fixed: tuple[MemoryLine, ...],
    loading_bytes: int,
    experts: tuple[ExpertRoom, ...],
    available_bytes: int | None,
) -> MemoryPlan:
    """Return the plan that keeps a run inside its budget, with as many expert slots as that leaves.

    Args:
        request: the budget.
        fixed: everything but the expert slots: process, skeleton, KV cache, buffers, margin.
        loading_bytes: the peak while the skeleton is loaded, when there are no slots yet.
        experts: what a slot costs and how many make sense, by record size.
        available_bytes: what this process could grow to, what it holds already included; None:
            not known, for another machine.

    Raises:
        BudgetError: the budget is below the minimum, or the machine has less free than the plan
        takes.
    """
    budget = request.size_bytes if request.kind == "bytes" else None
    if request.kind == "auto":
        assert available_bytes is not None  # what is free elsewhere nobody knows
        budget = int(available_bytes * (1 - _AUTO_MARGIN_SHARE))
    needed = require_budget(
        "the run",
        budget,
        (*fixed, _slot_line(split_slots(0, experts), experts)),
        peak_bytes=loading_bytes,
        instead="--memory min for the least that works",
    )
    if budget is not None:
        slots = slots_within(budget - sum_lines(fixed), experts)
    else:
        n_experts = sum(room.n_experts for room in experts)
        slots = split_slots(request.n_slots + math.floor(request.share * n_experts), experts)
    lines = (*fixed, _slot_line(slots, experts))
    total = max(sum_lines(lines), loading_bytes)
    if available_bytes is not None and total > available_bytes:
        raise lacks_memory(total, least_bytes=needed, free_bytes=available_bytes, lines=lines)
    budget_bytes = request.size_bytes if request.kind == "bytes" else total
    return MemoryPlan(lines=lines, slots=slots, budget_bytes=budget_bytes)


def _slot_line(slots: tuple[int, ...], experts: tuple[ExpertRoom, ...]) -> MemoryLine:
    n_experts = sum(room.n_experts for room in experts)
    return MemoryLine(
        name=f"{sum(slots)} of {n_experts} expert slots", size_bytes=bytes_of_slots(slots, experts)
    )
