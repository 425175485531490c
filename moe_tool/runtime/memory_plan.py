"""What a run needs of memory, line by line, and how many expert slots a budget buys."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from moe_tool.byte_sizes import format_bytes, parse_bytes
from moe_tool.errors import BudgetError, UsageError
from moe_tool.runtime.expert_room import (
    ExpertRoom,
    bytes_of_slots,
    slots_within,
    split_slots,
)

MARGIN_BYTES = 24 * 2**20
"""Holes in the heap, reader threads, Python objects that come and go"""
_SUGGESTION_STEP_BYTES = 16 * 2**20
_SUGGESTION_SLACK_BYTES = 16 * 2**20
"""The process's own size differs by a few MiB from start to start; a suggested budget has to work
when typed in."""
_AUTO_MARGIN_SHARE = 0.1
_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRequest:
    """What `--memory` asks for."""

    kind: Literal["bytes", "share", "min", "auto"]
    size_bytes: int = 0
    """Of the whole process, where `kind` is bytes"""
    share: float = 0.0
    """Of the bundle's expert bytes, 0 to 1, where `kind` is share"""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLine:
    """One entry of the account."""

    name: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Where the bytes of a run go."""

    lines: tuple[MemoryLine, ...]
    """Everything fixed, then the expert slots; their sum is `total_bytes`"""
    slots: tuple[int, ...]
    """Expert records in memory by record size, one pool each for all layers"""
    budget_bytes: int
    """What the process may hold at most; at least `total_bytes`"""

    @property
    def n_slots(self) -> int:
        """Expert records in memory."""
        return sum(self.slots)

    @property
    def total_bytes(self) -> int:
        """What the lines add up to."""
        return sum(line.size_bytes for line in self.lines)


def parse_memory(text: str) -> MemoryRequest:
    """Return what "4GiB", "50%", "min" or "auto" asks for.

    Raises:
        UsageError: the text is none of these, or a share above 100 %.
    """
    word = text.strip().lower()
    if word == "min":
        return MemoryRequest(kind="min")
    if word == "auto":
        return MemoryRequest(kind="auto")
    percent = _PERCENT.fullmatch(text)
    if percent is not None:
        share = float(percent[1]) / 100
        if share > 1:
            raise UsageError(
                f"--memory {text} is more than all experts", hint="use 100% or less, or auto"
            )
        return MemoryRequest(kind="share", share=share)
    try:
        return MemoryRequest(kind="bytes", size_bytes=parse_bytes(text))
    except UsageError as error:
        raise UsageError(
            f"'{text}' is not a memory budget", hint="write 4GiB, 50%, min or auto"
        ) from error


def plan_memory(
    request: MemoryRequest,
    *,
    fixed: tuple[MemoryLine, ...],
    loading_bytes: int,
    experts: tuple[ExpertRoom, ...],
    available_bytes: int,
) -> MemoryPlan:
    """Return the plan that keeps a run inside its budget, with as many expert slots as that leaves.

    Args:
        request: the budget.
        fixed: everything but the expert slots: process, skeleton, KV cache, buffers, margin.
        loading_bytes: the peak while the skeleton is loaded, when there are no slots yet.
        experts: what a slot costs and how many make sense, by record size.
        available_bytes: what this process could grow to, what it holds already included.

    Raises:
        BudgetError: the budget is below the minimum, or the machine has less free than the plan
        takes.
    """
    fixed_bytes = sum(line.size_bytes for line in fixed)
    slots = split_slots(0, experts)
    needed = max(fixed_bytes + bytes_of_slots(slots, experts), loading_bytes)
    if request.kind == "share":
        n_experts = sum(room.n_experts for room in experts)
        slots = split_slots(math.floor(request.share * n_experts), experts)
    elif request.kind != "min":
        budget = request.size_bytes
        if request.kind == "auto":
            budget = int(available_bytes * (1 - _AUTO_MARGIN_SHARE))
        if budget < needed:
            raise _too_small(budget, needed, fixed=fixed, experts=experts)
        slots = slots_within(budget - fixed_bytes, experts)
    lines = (*fixed, _slot_line(slots, experts))
    total = max(sum(line.size_bytes for line in lines), loading_bytes)
    if total > available_bytes:
        raise _machine_too_small(total, needed, available_bytes=available_bytes, lines=lines)
    budget_bytes = request.size_bytes if request.kind == "bytes" else total
    return MemoryPlan(lines=lines, slots=slots, budget_bytes=budget_bytes)


def describe_lines(lines: tuple[MemoryLine, ...]) -> str:
    """Return the account as indented text, one line per entry."""
    width = max(len(line.name) for line in lines)
    return "\n".join(
        f"  {line.name:<{width}}  {format_bytes(line.size_bytes):>12}" for line in lines
    )


def suggested_budget(needed_bytes: int) -> str:
    """Return the smallest round budget that works, as it can be typed after `--memory`."""
    steps = math.ceil((needed_bytes + _SUGGESTION_SLACK_BYTES) / _SUGGESTION_STEP_BYTES)
    return f"{steps * _SUGGESTION_STEP_BYTES // 2**20}MiB"


def _slot_line(slots: tuple[int, ...], experts: tuple[ExpertRoom, ...]) -> MemoryLine:
    n_experts = sum(room.n_experts for room in experts)
    return MemoryLine(
        name=f"{sum(slots)} of {n_experts} expert slots", size_bytes=bytes_of_slots(slots, experts)
    )


def _too_small(
    budget: int, needed: int, *, fixed: tuple[MemoryLine, ...], experts: tuple[ExpertRoom, ...]
) -> BudgetError:
    lines = (*fixed, _slot_line(split_slots(0, experts), experts))
    return BudgetError(
        f"a memory budget of {format_bytes(budget)} ({budget} bytes) is too small: "
        f"at least {format_bytes(needed)} ({needed} bytes) are needed\n{describe_lines(lines)}",
        hint=f"--memory {suggested_budget(needed)}, or --memory min for the least that works",
    )


def _machine_too_small(
    total: int, needed: int, *, available_bytes: int, lines: tuple[MemoryLine, ...]
) -> BudgetError:
    if needed <= available_bytes:
        hint = "--memory auto takes what is free; --memory min takes the least that works"
    else:
        hint = "a shorter --context, --bits 4 when packing, or a machine with more memory"
    return BudgetError(
        f"the run takes {format_bytes(total)} ({total} bytes), but only "
        f"{format_bytes(available_bytes)} ({available_bytes} bytes) are free here\n"
        f"{describe_lines(lines)}",
        hint=hint,
    )
