"""`moe-tool buddies`: make a buddy map from a profile."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moe_tool.artifact_folder import DEFAULT_FOLDER, buddies_path
from moe_tool.budget.sizes import format_bytes
from moe_tool.cli.console import Output
from moe_tool.cli.newest_profile import newest_profile
from moe_tool.cli.options import ProfilesOption
from moe_tool.cli.verb import verb

if TYPE_CHECKING:
    from moe_tool.artifacts.buddy_summary import BuddyReport

By = Literal["output", "cka", "cosine", "coactivation", "router"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuddiesArguments:
    profile: Annotated[
        Path | None,
        typer.Argument(metavar="PROFILE", help="A profile.", show_default="newest in profiles/"),
    ] = None
    k: Annotated[int, typer.Option(metavar="K", min=1, help="Stand-ins per expert.")] = 2
    by: Annotated[
        By,
        typer.Option(
            help="Measure to rank stand-ins by: remaining error (output), similar outputs (cka, "
            "cosine), chosen together (coactivation), or similar router logits (router)."
        ),
    ] = "output"
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", show_default="profiles/NAME.buddies.json", help="The map."),
    ] = None
    profiles: ProfilesOption = DEFAULT_FOLDER


@verb
def buddies(given: BuddiesArguments, output: Output) -> None:
    """Find the K best stand-ins of every expert. Each has a scale and a price."""
    profile = given.profile or newest_profile(given.profiles, output)

    from moe_tool.buddies.make_buddies import make_buddies
    from moe_tool.reports.terminal import buddies_table

    default = buddies_path(given.profiles, profile)
    made = make_buddies(
        profile,
        k=given.k,
        by=given.by,
        out=given.out or default,
        may_replace=given.out is not None,
    )
    output.show(
        "remaining error of stand-ins, relative to the expert's output (1: same as dropping)",
        buddies_table(made.summary),
    )
    output.say(
        f"wrote {made.buddies}: {format_bytes(made.buddies.stat().st_size)}; {given.k} stand-ins "
        f"per expert by {given.by}, {output.seconds:.1f} s"
    )
    output.say(f"next: {_pack_command(made, is_default=made.buddies == default)}")
    output.result(made)


def _pack_command(made: "BuddyReport", *, is_default: bool) -> str:
    from moe_tool.models.locate import model_to_type

    files = "" if is_default else f" --profile {made.profile} --buddies {made.buddies}"
    return f"moe-tool pack {model_to_type(made.model)}{files} --out bundle/"
