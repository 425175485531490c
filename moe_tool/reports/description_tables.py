"""Tables below an artifact's facts, by the artifact's type."""

from collections.abc import Sequence

from rich.table import Table

from moe_tool.artifacts.bit_prices import BitPrices
from moe_tool.artifacts.hardware_profile import HardwareProfile
from moe_tool.artifacts.pack_plan import PackPlan
from moe_tool.artifacts.routing_report import ProfileRouting
from moe_tool.reports.hardware_table import experts_table, lookup_table, speeds_table
from moe_tool.reports.plan_table import bit_prices_table, forms_table, lines_table
from moe_tool.reports.routing_tables import profile_tables


def tables_of(artifact: object) -> Sequence[Table]:
    """Return the tables of an artifact; empty for types without any."""
    match artifact:
        case BitPrices():
            return [bit_prices_table(artifact)]
        case HardwareProfile():
            tables = [speeds_table(artifact), experts_table(artifact)]
            return [*tables, lookup_table(artifact)] if artifact.lookup else tables
        case PackPlan():
            tables = [lines_table(artifact.lines)]
            return [*tables, forms_table(artifact)] if artifact.forms else tables
        case ProfileRouting():
            return [*profile_tables(artifact)]
    return ()
