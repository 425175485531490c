"""Memory plan of a run: fixed lines, and the expert slots that fit into the budget."""

import math
from dataclasses import dataclass

from moe_tool.budget.refusal import MemoryLine, lacks_memory, require_budget, sum_lines
from moe_tool.budget.request import MemoryRequest
from moe_tool.budget.slots import ExpertRoom, bytes_of_slots, slots_within, split_slots

MARGIN_BYTES = 24 * 2**20
"""Allowance for heap fragmentation, reader threads and temporary Python objects"""
_AUTO_MARGIN_SHARE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Memory plan of a run that keeps its budget."""

    lines: tuple[MemoryLine, ...]
    """Fixed lines, then the expert slots; their sum is `total_bytes`"""
    slots: tuple[int, ...]
    """Expert records in memory by record size, each size one pool for all layers"""
    budget_bytes: int
    """Limit of the process; at least `total_bytes`"""

    @property
    def n_slots(self) -> int:
        return sum(self.slots)

    @property
    def total_bytes(self) -> int:
        return sum_lines(self.lines)


def plan_memory(
    request: MemoryRequest,
    *,
    fixed: tuple[MemoryLine, ...],
    loading_bytes: int,
    experts: tuple[ExpertRoom, ...],
    available_bytes: int | None,
) -> MemoryPlan:
    """Return the memory plan with as many expert slots as fit into the budget.

    Args:
        fixed: everything but the expert slots: process, skeleton, KV cache, buffers, margin.
        loading_bytes: the peak while the skeleton is loaded, when there are no slots yet.
        experts: slot sizes and limits, by record size.
        available_bytes: size that this process can reach; None for another machine.

    Raises:
        BudgetError: the budget is below the minimum, or the plan takes more than is available.
    """
    budget = request.size_bytes if request.kind == "bytes" else None
    if request.kind == "auto":
        assert available_bytes is not None
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
