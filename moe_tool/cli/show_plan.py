"""Output of `moe-tool plan`: plans as tables and as JSON fields."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_tool.budget.sizes import format_bytes
from moe_tool.cli.console import Output
from moe_tool.errors import BudgetError

if TYPE_CHECKING:
    from moe_tool.artifacts.pack_plan import PackPlan
    from moe_tool.planning.build_plan import PlanReport


def show_plan(report: "PlanReport", output: Output) -> None:
    """Print a plan, its alternatives and its notes."""
    from moe_tool.reports.plan_table import lines_table

    plan = report.plan
    output.show(
        f"{plan.identity.name} in {format_bytes(plan.memory_bytes)} on {plan.hardware}: experts at "
        f"{_experts(report)}, others at {plan.skeleton_bits}{_answers_to_misses(plan)}",
        _predicted(report),
        "",
        *_compared(report),
        "",
        *_caches(report),
        f"memory, {format_bytes(plan.memory_bytes)}",
        lines_table(plan.lines),
        "",
    )
    for each in report.neighbours:
        output.show(
            f"with {format_bytes(each.memory_bytes)} it would be {each.tokens_per_second:.2f} "
            f"tokens/s, {each.ratio:.2f} times as much"
            + ("" if each.kl is None else f", expected KL {each.kl:.2g}")
        )
    for note in report.notes:
        output.say(note)


def show_curve(
    reports: "Sequence[PlanReport]",
    refused: Sequence[tuple[str, BudgetError]],
    output: Output,
) -> None:
    """Print the plans of several budgets, one per line.

    Raises:
        BudgetError: every budget was refused.
    """
    from moe_tool.reports.plan_table import curve_table

    for memory, error in refused:
        output.say(f"{memory}: {error.message.splitlines()[0]}")
    if not reports:
        raise refused[-1][1]
    output.show(curve_table([report.plan for report in reports]))
    output.say("no plan was written: give one --memory for that")
    output.result(
        {
            "plans": [plan_fields(report) for report in reports],
            "refused": {memory: error.message for memory, error in refused},
        }
    )


def plan_fields(report: "PlanReport") -> dict[str, Any]:
    """Return a report's fields for `--json`."""
    return asdict(report) | {"plan": report.plan.model_dump(mode="json")}


def pack_command(plan: "PackPlan", path: Path, model: str | None) -> str:
    """Return the next command to type; never into an existing bundle/, which may differ in bits."""
    from moe_tool.artifacts.model_names import model_to_type

    bundle = "planned/" if Path("bundle").exists() else "bundle/"
    return (
        f"moe-tool pack {model or model_to_type(plan.identity.name)} --plan {path} --out {bundle}"
    )


def _caches(report: "PlanReport") -> list[Any]:
    """Return the judgement of the eviction that was searched for the caches of two forms."""
    from moe_tool.reports.plan_table import penalties_table

    if not report.penalties:
        return []
    heading = (
        "caches of two forms: penalty of misses in reads of a full record, HOBBIT's weights "
        "searched on the profile's first part, all judged on the rest"
    )
    return [heading, penalties_table(report.penalties), ""]


def _experts(report: "PlanReport") -> str:
    if not report.allocations:
        return report.plan.bits
    chosen = report.allocations[0]
    return (
        f"{chosen.average_bits:.2f} bits on average by {report.plan.quantizer}, "
        f"{format_bytes(chosen.expert_bytes)}"
    )


def _answers_to_misses(plan: "PackPlan") -> str:
    if plan.policy is not None:
        return f", policy {plan.policy}, replicas {plan.replicas}"
    return "" if plan.bits == "mixed" else f", eviction {plan.eviction}, prefetch {plan.prefetch}"


def _predicted(report: "PlanReport") -> str:
    found = report.plan.prediction
    speed = f"predicted: {found.tokens_per_second:.2f} tokens/s (+-{found.error:.0%})"
    if report.allocations:
        return f"{speed}, {_reading(report)}, expected KL {found.kl:.2g}"
    return (
        f"{speed}, {_reading(report)}, {found.hit_rate:.1%} hits, "
        f"{found.seconds_to_first_token:.1f} s to the first token of a prompt of "
        f"{found.prompt_tokens}"
    )


def _reading(report: "PlanReport") -> str:
    read = report.plan.prediction.bytes_per_token
    if read:
        return f"{format_bytes(read)} read per token"
    if report.plan.policy is not None:
        return "nothing read"
    return "nothing read once the cache is full"


def _compared(report: "PlanReport") -> list[Any]:
    """Return resident forms under a lossy policy, else allocations of mixed bits, else the replayed
    eviction policies."""
    from moe_tool.reports.plan_table import allocations_table, forms_table, rows_to_show
    from moe_tool.reports.simulation_table import details_table

    if report.plan.policy is not None:
        return ["experts in memory", forms_table(report.plan)]
    if report.allocations:
        return ["other allocations of the same bits", allocations_table(report.allocations)]
    heading = "the best replayed policies, plain lru, and the bound belady, which no policy reaches"
    if len(report.best) == 1:
        heading = "every expert stays in memory"
    return [heading, details_table(rows_to_show(report.best, report.lru, report.bound))]
