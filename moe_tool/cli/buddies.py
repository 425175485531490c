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
Scale = Literal["fitted", "none"]
_AS_BAD_AS_DROPPING = 0.9
"""Share of the error of dropping from which stand-ins are warned of"""


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
    alpha: Annotated[
        float,
        typer.Option(
            metavar="A", min=0, max=1, help="Coactivation: frequency at which a list ends."
        ),
    ] = 0.9
    alpha_by_layer: Annotated[
        str | None,
        typer.Option(metavar="LAYER=A,...", help="Other alphas of some layers: 0=0.9,3=0.75."),
    ] = None
    weighted: Annotated[
        bool, typer.Option("--weighted", help="Coactivation: weigh pairs by both gate weights.")
    ] = False
    smoothing: Annotated[
        float,
        typer.Option(metavar="N", min=0, help="Coactivation: add to the count of every pair."),
    ] = 0.0
    warm_up: Annotated[
        int,
        typer.Option(
            metavar="TOKENS", min=0, help="Coactivation: tokens at each head that count less."
        ),
    ] = 0
    warm_up_weight: Annotated[
        float, typer.Option(metavar="W", min=0, max=1, help="Weight of these tokens.")
    ] = 0.0
    scale: Annotated[
        Scale, typer.Option(help="Factor on a stand-in's output: fitted, or none (1).")
    ] = "fitted"
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", show_default="profiles/NAME.buddies.json", help="The map."),
    ] = None
    profiles: ProfilesOption = DEFAULT_FOLDER


@verb
def buddies(given: BuddiesArguments, output: Output) -> None:
    """Find the K best stand-ins of every expert. Each has a scale and a price."""
    profile = given.profile or newest_profile(given.profiles, output)

    from moe_tool.buddies.list_rules import ListRules, parse_alpha_by_layer
    from moe_tool.buddies.make_buddies import make_buddies
    from moe_tool.reports.terminal import buddies_table

    rules = ListRules(
        alpha=given.alpha,
        alpha_by_layer=parse_alpha_by_layer(given.alpha_by_layer) if given.alpha_by_layer else {},
        weighted=given.weighted,
        smoothing=given.smoothing,
        warm_up=given.warm_up,
        warm_up_weight=given.warm_up_weight,
        scale=given.scale,
    )
    default = buddies_path(given.profiles, profile)
    made = make_buddies(
        profile,
        k=given.k,
        by=given.by,
        rules=rules,
        out=given.out or default,
        may_replace=given.out is not None,
    )
    output.show(
        "remaining error of stand-ins, relative to the expert's output (1: same as dropping)",
        buddies_table(made.summary),
    )
    if made.summary.price_held_out > _AS_BAD_AS_DROPPING * made.summary.price_drop:
        output.say(
            "on held-out text these stand-ins leave about as much error as leaving the expert out "
            "does: cheaper forms (moe-tool pack --replicas 2) or --policy near-tie may answer "
            "better, and evaluate --controls measures it"
        )
    output.say(
        f"wrote {made.buddies}: {format_bytes(made.buddies.stat().st_size)}; {given.k} stand-ins "
        f"per expert by {given.by}, {output.seconds:.1f} s"
    )
    output.say(f"next: {_pack_command(made, is_default=made.buddies == default)}")
    output.result(made)


def _pack_command(made: "BuddyReport", *, is_default: bool) -> str:
    from moe_tool.artifacts.model_names import model_to_type

    files = "" if is_default else f" --profile {made.profile} --buddies {made.buddies}"
    return f"moe-tool pack {model_to_type(made.model)}{files} --out bundle/"
