"""Tables of replayed traces, and of a recorded run beside its replay."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from rich.table import Table

from moe_tool.artifacts.simulation_report import (
    BELADY,
    PolicyHits,
    PrefetchRow,
    PromptRow,
    RunComparison,
    SimulatedRow,
)
from moe_tool.budget.sizes import format_bytes
from moe_tool.reports.columns import columns

Row = TypeVar("Row", SimulatedRow, PromptRow)


def hit_rate_table(rows: Mapping[str, Sequence[SimulatedRow]]) -> Table:
    """Return hit rate and tokens per second, a row per policy and a column per budget."""
    return _by_budget(
        [row for each in rows.values() for row in each],
        lambda row: f"{row.hit_rate:.0%} {_speed(row.tokens_per_second)}",
    )


def details_table(rows: Sequence[SimulatedRow]) -> Table:
    """Return every figure of some rows."""
    table = columns(
        "memory", "slots", "experts", "eviction", "hits", "read/token", "stall ms", "tokens/s",
        "p50 ms", "p99 ms", "x belady", "limit",
        words=(0, 3, 11), ruled=False,
    )  # fmt: skip
    for row in rows:
        table.add_row(
            row.memory,
            str(row.slots),
            format_bytes(row.expert_bytes),
            row.eviction,
            f"{row.hit_rate:.1%}",
            format_bytes(row.bytes_per_token),
            f"{row.stall_ms:.1f}",
            _speed(row.tokens_per_second),
            f"{row.p50_ms:.1f}",
            f"{row.p99_ms:.1f}",
            "-" if row.to_belady is None else f"{row.to_belady:.2f}",
            row.limited_by,
        )
    return table


def prompt_table(rows: Sequence[PromptRow]) -> Table:
    """Return hit rate and bytes of prompts, a row per policy and a column per budget."""
    return _by_budget(rows, lambda row: f"{row.hit_rate:.0%} {format_bytes(row.bytes_per_token)}")


def _by_budget(rows: Sequence[Row], cell: Callable[[Row], str]) -> Table:
    budgets = list(dict.fromkeys(row.memory for row in rows))
    table = columns("eviction", *budgets, ruled=False)
    cells = {(row.eviction, row.memory): cell(row) for row in rows}
    for policy in dict.fromkeys(row.eviction for row in rows):
        shown = (cells.get((policy, memory), "-") for memory in budgets)
        table.add_row(policy, *shown, style="bold" if policy == BELADY else None)
    return table


def prefetch_table(rows: Sequence[PrefetchRow]) -> Table:
    """Return the effect of prefetching, one row per budget, policy and way to prefetch."""
    headings = ("memory", "eviction", "prefetch", "wanted", "bytes/saved", "stall saved ms", "pays")
    table = columns(*headings, words=(0, 1, 2, 6), ruled=False)
    for row in rows:
        per_byte = row.bytes_per_saved_byte
        table.add_row(
            row.memory,
            row.eviction,
            row.prefetch,
            f"{row.accuracy:.0%}",
            "-" if per_byte is None else f"{per_byte:.1f}",
            f"{row.stall_saved_ms:.2f}",
            "yes" if row.pays else "no",
        )
    return table


def comparison_table(found: RunComparison) -> Table:
    """Return the run's counters beside the replay's."""
    table = columns("", "run", "replayed", ruled=False)
    table.add_row("hits while decoding", str(found.hits), str(found.predicted_hits))
    table.add_row("hits in the prompt", str(found.prompt_hits), str(found.predicted_prompt_hits))
    table.add_row(
        "prefetched and wanted", str(found.prefetch_hits), str(found.predicted_prefetch_hits)
    )
    table.add_row(
        "tokens/s", f"{found.tokens_per_second:.2f}", f"{found.predicted_tokens_per_second:.2f}"
    )
    table.add_row("stall, ms per token", f"{found.stall_ms:.1f}", f"{found.predicted_stall_ms:.1f}")
    return table


def policies_table(rows: Sequence[PolicyHits]) -> Table:
    """Return hits and bytes of each policy."""
    table = columns("eviction", "hits", "read/token", ruled=False)
    for row in rows:
        table.add_row(row.eviction, f"{row.hit_rate:.1%}", format_bytes(row.bytes_per_token))
    return table


def _speed(tokens_per_second: float) -> str:
    return f"{tokens_per_second:.{0 if tokens_per_second >= 100 else 1}f}"
