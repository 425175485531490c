"""Tables of plans."""

from collections.abc import Sequence

from rich.table import Table

from moe_tool.artifacts.bit_prices import Allocation, BitPrices
from moe_tool.artifacts.pack_plan import PackPlan, PlanLine
from moe_tool.artifacts.simulation_report import CachePenalty, SimulatedRow
from moe_tool.budget.sizes import format_bytes
from moe_tool.reports.columns import columns


def rows_to_show(
    best: Sequence[SimulatedRow], lru: SimulatedRow, bound: SimulatedRow
) -> list[SimulatedRow]:
    """Return the best rows, plain lru if not among them, and the bound; a single best row alone."""
    if len(best) == 1:
        return list(best)
    is_there = any(row.eviction == lru.eviction for row in best)
    return [*best, *([] if is_there else [lru]), bound]


def lines_table(lines: Sequence[PlanLine]) -> Table:
    """Return the lines of a memory plan."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for line in lines:
        table.add_row(line.name, format_bytes(line.size_bytes))
    return table


def forms_table(plan: PackPlan) -> Table:
    """Return the number of experts in memory by form."""
    headings = ("form", "in memory", "on disk only", "one takes", "all of them")
    table = columns(*headings, ruled=False)
    for form in plan.forms:
        held = form.cached or len(form.resident)
        table.add_row(
            form.precision,
            f"{held} cached" if form.cached else str(held),
            str(form.n_disk_only),
            format_bytes(form.record_bytes),
            format_bytes(held * form.record_bytes),
        )
    return table


def penalties_table(penalties: Sequence[CachePenalty]) -> Table:
    """Return the penalty per token of each eviction policy, and the first one's against it."""
    table = columns("eviction", "penalty/token", "the first against it", ruled=False)
    first = penalties[0].reads_per_token
    for each in penalties:
        against = f"{first / each.reads_per_token - 1:+.1%}" if each.reads_per_token else "-"
        table.add_row(each.eviction, f"{each.reads_per_token:.3f}", against)
    return table


def allocations_table(allocations: Sequence[Allocation]) -> Table:
    """Return the number of experts by bits, one row per allocation."""
    widths = sorted({width for each in allocations for width in each.experts})
    names = {0: "removed", 16: "native"}
    headings = [names.get(width, f"{width} bit{'s' * (width > 1)}") for width in widths]
    of_all = ("allocation", "average", "expected KL", "bytes")
    table = columns(*of_all, *headings, ruled=False)
    for each in allocations:
        table.add_row(
            each.name,
            f"{each.average_bits:.2f}",
            f"{each.nats:.3g}",
            format_bytes(each.expert_bytes),
            *(str(each.experts.get(width, 0)) for width in widths),
        )
    return table


def bit_prices_table(prices: BitPrices) -> Table:
    """Return the mean error of a layer's experts at each width, one row per layer."""
    errors = (f"error at {width} bits" for width in prices.widths)
    table = columns("layer", *errors, "KL ratio", words=(), ruled=False)
    for entry in prices.layers:
        means = (sum(row) / len(row) for row in entry.eps)
        table.add_row(
            str(entry.layer), *(f"{mean:.3f}" for mean in means), f"{entry.kl_ratio:.2f}x"
        )
    return table


def curve_table(plans: Sequence[PackPlan]) -> Table:
    """Return the plans of several budgets, one per row."""
    numbers = ("slots", "hits", "read/token", "tokens/s", "first token s", "KL")
    table = columns("memory", "bits", "misses", *numbers, words=(0, 1, 2), ruled=False)
    for plan in plans:
        found = plan.prediction
        table.add_row(
            format_bytes(plan.memory_bytes),
            plan.bits,
            plan.policy or plan.eviction,
            str(found.expert_slots),
            f"{found.hit_rate:.1%}",
            format_bytes(found.bytes_per_token),
            f"{found.tokens_per_second:.2f}",
            f"{found.seconds_to_first_token:.1f}",
            "-" if found.kl is None else f"{found.kl:.2g}",
        )
    return table
