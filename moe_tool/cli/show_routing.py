"""What `profile` and `inspect` print of a profile's routing."""

from collections.abc import Sequence

from moe_tool.artifacts.routing_report import RoutingReport
from moe_tool.cli.console import Output
from moe_tool.profiling.coverage import LayerCoverage, pin_verdict
from moe_tool.reports.routing_tables import routing_tables
from moe_tool.reports.terminal import coverage_table


def show_routing(output: Output, coverage: Sequence[LayerCoverage], routing: RoutingReport) -> None:
    """Print a row per layer, then the tables of the whole model."""
    words = [pin_verdict(row).split(":")[0] for row in coverage]
    output.show(coverage_table(coverage, routing.domains, words))
    output.show(*routing_tables(routing))
