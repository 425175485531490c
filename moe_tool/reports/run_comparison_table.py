"""A recorded run beside its replay, as tables for people."""

from collections.abc import Sequence
from typing import Protocol

from rich.table import Table

from moe_tool.budget.sizes import format_bytes


class Comparison(Protocol):
    """Counted and predicted."""

    @property
    def hits(self) -> int: ...
    @property
    def predicted_hits(self) -> int: ...
    @property
    def prompt_hits(self) -> int: ...
    @property
    def predicted_prompt_hits(self) -> int: ...
    @property
    def prefetch_hits(self) -> int: ...
    @property
    def predicted_prefetch_hits(self) -> int: ...
    @property
    def tokens_per_second(self) -> float: ...
    @property
    def predicted_tokens_per_second(self) -> float: ...
    @property
    def stall_ms(self) -> float: ...
    @property
    def predicted_stall_ms(self) -> float: ...


class PolicyFigures(Protocol):
    """One policy."""

    @property
    def eviction(self) -> str: ...
    @property
    def hit_rate(self) -> float: ...
    @property
    def bytes_per_token(self) -> float: ...


def comparison_table(found: Comparison) -> Table:
    """Return what the run counted beside what the replay says."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for heading in ("run", "replayed"):
        table.add_column(heading, justify="right")
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


def policies_table(rows: Sequence[PolicyFigures]) -> Table:
    """Return hits and bytes of each policy."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("eviction")
    for heading in ("hits", "read/token"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(row.eviction, f"{row.hit_rate:.1%}", format_bytes(row.bytes_per_token))
    return table
