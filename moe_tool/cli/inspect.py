"""`moe-tool inspect`: describe a file or folder and check that it is intact."""

from pathlib import Path
from typing import Annotated

import typer

from moe_tool.cli.console import open_output
from moe_tool.cli.options import JsonOption
from moe_tool.errors import CorruptArtifactError


def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="A profile, a buddy map, a plan, a hardware profile, a run trace, a "
            "bundle or a checkpoint.",
            show_default=False,
        ),
    ],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read everything and check every hash.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Describe a file or folder and check that it is intact."""
    with open_output(as_json=json) as output:
        from moe_tool.inspection.describe_artifact import describe_artifact
        from moe_tool.reports.description_tables import tables_of
        from moe_tool.reports.terminal import facts_table

        found = describe_artifact(path, verify=verify, progress=output.progress)
        state = "intact" if found.is_intact else "NOT intact"
        output.show(
            f"{found.path}: a {found.kind}, {state} ({found.checked})",
            facts_table(found.facts),
            *tables_of(found.tabled),
        )
        output.result(found.to_json())
        if not found.is_intact:
            raise typer.Exit(CorruptArtifactError.exit_code)
