"""The simulator's figures as tables for people."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from rich.table import Table

from moe_tool.budget.sizes import format_bytes


class Row(Protocol):
    """One budget under one policy."""

    @property
    def memory(self) -> str: ...
    @property
    def slots(self) -> int: ...
    @property
    def expert_bytes(self) -> int: ...
    @property
    def eviction(self) -> str: ...
    @property
    def hit_rate(self) -> float: ...
    @property
    def bytes_per_token(self) -> float: ...
    @property
    def stall_ms(self) -> float: ...
    @property
    def tokens_per_second(self) -> float: ...
    @property
    def p50_ms(self) -> float: ...
    @property
    def p99_ms(self) -> float: ...
    @property
    def to_belady(self) -> float | None: ...
    @property
    def limited_by(self) -> str: ...


class PromptFigures(Protocol):
    """A prompt at one budget under one policy."""

    @property
    def memory(self) -> str: ...
    @property
    def eviction(self) -> str: ...
    @property
    def hit_rate(self) -> float: ...
    @property
    def bytes_per_token(self) -> float: ...


class PrefetchFigures(Protocol):
    """Reading ahead at one budget."""

    @property
    def memory(self) -> str: ...
    @property
    def eviction(self) -> str: ...
    @property
    def depth(self) -> int: ...
    @property
    def accuracy(self) -> float: ...
    @property
    def bytes_per_saved_byte(self) -> float | None: ...
    @property
    def stall_saved_ms(self) -> float: ...
    @property
    def pays(self) -> bool: ...


def hit_rate_table(rows: Mapping[str, Sequence[Row]]) -> Table:
    """Return hit rate and tokens per second, a line per policy and a column per budget."""
    columns = list(dict.fromkeys(row.memory for each in rows.values() for row in each))
    table = _table("eviction", *columns)
    for policy, each in rows.items():
        found = {row.memory: row for row in each}
        cells = [_cell(found.get(memory)) for memory in columns]
        table.add_row(policy, *cells, style="bold" if policy == "belady" else None)
    return table


def _cell(row: Row | None) -> str:
    return "-" if row is None else f"{row.hit_rate:.0%} {_speed(row.tokens_per_second)}"


def details_table(rows: Sequence[Row]) -> Table:
    """Return everything about a few rows."""
    table = _table(
        "memory", "slots", "experts", "eviction", "hits", "read/token", "stall ms", "tokens/s",
        "p50 ms", "p99 ms", "x belady", "limit",
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


def prompt_table(rows: Sequence[PromptFigures]) -> Table:
    """Return what prompts read, a line per policy and a column per budget."""
    columns = list(dict.fromkeys(row.memory for row in rows))
    table = _table("eviction", *columns)
    for policy in dict.fromkeys(row.eviction for row in rows):
        found = {row.memory: row for row in rows if row.eviction == policy}
        cells = [
            f"{found[m].hit_rate:.0%} {format_bytes(found[m].bytes_per_token)}"
            if m in found
            else "-"
            for m in columns
        ]
        table.add_row(policy, *cells)
    return table


def prefetch_table(rows: Sequence[PrefetchFigures]) -> Table:
    """Return what reading ahead would change."""
    table = _table("memory", "eviction", "depth", "wanted", "bytes/saved", "stall saved ms", "pays")
    for row in rows:
        per_byte = row.bytes_per_saved_byte
        table.add_row(
            row.memory,
            row.eviction,
            str(row.depth),
            f"{row.accuracy:.0%}",
            "-" if per_byte is None else f"{per_byte:.1f}",
            f"{row.stall_saved_ms:.2f}",
            "yes" if row.pays else "no",
        )
    return table


def _speed(tokens_per_second: float) -> str:
    return f"{tokens_per_second:.{0 if tokens_per_second >= 100 else 1}f}"


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        words = heading in ("eviction", "memory", "limit", "pays")
        table.add_column(heading, justify="left" if words else "right", no_wrap=True)
    return table
