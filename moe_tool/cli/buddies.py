"""`moe-tool buddies`: make a buddy map from a profile."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moe_tool.artifact_folder import DEFAULT_FOLDER, buddies_path
from moe_tool.budget.sizes import format_bytes
from moe_tool.cli.console import open_output
from moe_tool.cli.newest_profile import newest_profile
from moe_tool.cli.options import JsonOption, ProfilesOption

if TYPE_CHECKING:
    from moe_tool.artifacts.buddy_summary import BuddyReport

By = Literal["output", "cka", "cosine", "coactivation", "router"]


def buddies(
    profile: Annotated[
        Path | None,
        typer.Argument(metavar="PROFILE", help="A profile.", show_default="newest in profiles/"),
    ] = None,
    k: Annotated[int, typer.Option("--k", metavar="K", min=1, help="Stand-ins per expert.")] = 2,
    by: Annotated[
        By,
        typer.Option(
            "--by",
            help="Measure to rank stand-ins by: remaining error (output), similar outputs (cka, "
            "cosine), chosen together (coactivation), or similar router logits (router).",
        ),
    ] = "output",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", show_default="profiles/NAME.buddies.json", help="The map."
        ),
    ] = None,
    profiles: ProfilesOption = DEFAULT_FOLDER,
    json: JsonOption = False,
) -> None:
    """Find the K best stand-ins of every expert. Each has a scale and a price."""
    with open_output(as_json=json) as output:
        profile = profile or newest_profile(profiles, output)

        from moe_tool.buddies.make_buddies import make_buddies
        from moe_tool.reports.terminal import buddies_table

        default = buddies_path(profiles, profile)
        made = make_buddies(profile, k=k, by=by, out=out or default, may_replace=out is not None)
        output.show(
            "remaining error of stand-ins, relative to the expert's output (1: same as dropping)",
            buddies_table(made.summary),
        )
        output.say(
            f"wrote {made.buddies}: {format_bytes(made.buddies.stat().st_size)}; {k} stand-ins "
            f"per expert by {by}, {output.seconds:.1f} s"
        )
        output.say(f"next: {_pack_command(made, is_default=made.buddies == default)}")
        output.result(made)


def _pack_command(made: "BuddyReport", *, is_default: bool) -> str:
    from moe_tool.models.locate import model_to_type

    files = "" if is_default else f" --profile {made.profile} --buddies {made.buddies}"
    return f"moe-tool pack {model_to_type(made.model)}{files} --out bundle/"
