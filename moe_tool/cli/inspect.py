"""`moe-tool inspect`: describe a file or folder and check that it is intact."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from moe_tool.cli.console import Output
from moe_tool.cli.verb import verb
from moe_tool.errors import CorruptArtifactError


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectArguments:
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="A profile, a buddy map, a plan, a hardware profile, a run trace, a bundle or a "
            "checkpoint.",
        ),
    ]
    verify: Annotated[
        bool, typer.Option("--verify", help="Read everything and check every hash.")
    ] = False


@verb
def inspect(given: InspectArguments, output: Output) -> None:
    """Describe a file or folder and check that it is intact."""
    from moe_tool.inspection.describe_artifact import describe_artifact
    from moe_tool.reports.description_tables import tables_of
    from moe_tool.reports.terminal import facts_table

    found = describe_artifact(given.path, verify=given.verify, progress=output.progress)
    state = "intact" if found.is_intact else "NOT intact"
    output.show(
        f"{found.path}: a {found.kind}, {state} ({found.checked})",
        facts_table(found.facts),
        *tables_of(found.tabled),
    )
    output.result(found.to_json())
    if not found.is_intact:
        raise typer.Exit(CorruptArtifactError.exit_code)
