"""Tables of facts, of stand-ins and of the demo's stages."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from moe_tool.artifacts.buddy_summary import BuddySummary, LayerBuddySummary
from moe_tool.budget.sizes import format_bytes
from moe_tool.reports.columns import columns


def facts_table(facts: Mapping[str, object]) -> Table:
    """Return a table of names and values; fields whose names end in `bytes` are shown as sizes."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), _fact(name, value))
    return table


def buddies_table(summary: BuddySummary) -> Table:
    """Return one row per MoE layer, and their mean."""
    table = columns(
        "layer",
        "in-sample",
        "held-out",
        "best possible",
        "dropped",
        "experts without\na stand-in",
        "experts with\nfew tokens",
    )
    for row in summary.layers:
        table.add_row(str(row.layer), *_prices(row), str(row.n_without), str(row.n_fell_back))
    table.add_section()
    table.add_row("mean", *_prices(summary), "", "")
    return table


def stages_table(rows: Sequence[tuple[str, str, float]]) -> Table:
    """Return one row per (stage, outcome, seconds)."""
    table = columns("stage", "outcome", "seconds", words=(0, 1))
    for stage, outcome, seconds in rows:
        table.add_row(stage, outcome, f"{seconds:.1f}")
    return table


def _prices(row: BuddySummary | LayerBuddySummary) -> list[str]:
    prices = (row.price_in_sample, row.price_held_out, row.price_best_held_out, row.price_drop)
    return [f"{price:.3f}" for price in prices]


def _fact(name: str, value: object) -> str:
    if value is None:
        return "none"
    if name.endswith("bytes") and isinstance(value, int):
        return f"{format_bytes(value)} ({value})"
    if isinstance(value, list | tuple):
        return ", ".join(str(entry) for entry in value)
    return str(value)
