"""Refusal of a memory budget: bytes needed, bytes available, the nearest budget that works."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from moe_tool.budget.sizes import format_bytes
from moe_tool.errors import BudgetError

_STEPS_PER_MIB = 10
_SLACK_BYTES = 2**19
"""Slack of a suggested budget: the process's own size varies by some 0.3 MiB between starts"""
TEXT_SLACK_BYTES = 8 * 2**20
"""Slack for work that reads texts first: heaps of its threads differ by up to 5 MiB"""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLine:
    """One named part of a process's memory."""

    name: str
    size_bytes: int


def name_lines(parts: Mapping[str, int]) -> tuple[MemoryLine, ...]:
    """Return one line per name; those of 0 bytes are left out."""
    return tuple(MemoryLine(name=name, size_bytes=size) for name, size in parts.items() if size)


def sum_lines(lines: tuple[MemoryLine, ...]) -> int:
    return sum(line.size_bytes for line in lines)


def suggested_budget(needed_bytes: int, *, slack_bytes: int = _SLACK_BYTES) -> str:
    """Return the smallest budget that works at the next start too, in the syntax of `--memory`."""
    steps = math.ceil((needed_bytes + slack_bytes) * _STEPS_PER_MIB / 2**20)
    return f"{steps / _STEPS_PER_MIB:.10g}MiB"


def require_budget(
    work: str,
    budget_bytes: int | None,
    lines: tuple[MemoryLine, ...],
    *,
    peak_bytes: int = 0,
    instead: str | None = None,
    slack_bytes: int = _SLACK_BYTES,
) -> int:
    """Return the minimum budget of some work.

    Args:
        work: subject of the message.
        budget_bytes: the budget; None: no limit.
        lines: the least memory that the work takes.
        peak_bytes: peak of another phase, which the lines do not show.
        instead: alternative remedy for the hint.
        slack_bytes: what the process's own size may differ by at the next start.

    Raises:
        BudgetError: the budget is below the minimum.
    """
    needed = max(sum_lines(lines), peak_bytes)
    if budget_bytes is None or budget_bytes >= needed:
        return needed
    nearest = suggested_budget(needed, slack_bytes=slack_bytes)
    raise BudgetError(
        f"the memory budget is too small: {work} needs {_exact(needed)}, has "
        f"{_exact(budget_bytes)}; the nearest that works is {nearest}\n{describe_lines(lines)}",
        hint=f"--memory {nearest}" + ("" if instead is None else f", or {instead}"),
    )


def lacks_memory(
    needed_bytes: int, *, least_bytes: int, free_bytes: int, lines: tuple[MemoryLine, ...]
) -> BudgetError:
    """Return the refusal of a run that takes more than the machine has free.

    Args:
        needed_bytes: bytes that the run takes within its budget.
        least_bytes: bytes that it takes with the fewest expert slots.
    """
    if least_bytes <= free_bytes:
        hint = "--memory auto takes what is free; --memory min takes the least that works"
        nearest = f"the least that works is {_exact(least_bytes)}"
    else:
        hint = "a shorter --context, --bits 4 when packing, or a machine with more memory"
        nearest = f"no budget works: the least is {_exact(least_bytes)}"
    return BudgetError(
        f"the run needs {_exact(needed_bytes)}, has {_exact(free_bytes)} free here; {nearest}\n"
        f"{describe_lines(lines)}",
        hint=hint,
    )


def describe_lines(lines: tuple[MemoryLine, ...]) -> str:
    """Return the lines as indented text."""
    width = max(len(line.name) for line in lines)
    return "\n".join(
        f"  {line.name:<{width}}  {format_bytes(line.size_bytes):>12}" for line in lines
    )


def _exact(size_bytes: int) -> str:
    return f"{format_bytes(size_bytes)} ({size_bytes} bytes)"
