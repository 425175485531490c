"""`moe-tool buddies`: a profile in, a map of stand-ins out."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moe_tool.artifact_folder import (
    DEFAULT_FOLDER,
    buddies_path,
)
from moe_tool.byte_sizes import format_bytes
from moe_tool.cli.console import open_output
from moe_tool.cli.newest_profile import newest_profile
from moe_tool.cli.options import JsonOption, ProfilesOption

if TYPE_CHECKING:
    from moe_tool.buddies.summary import BuddySummary

By = Literal["output", "cka", "cosine", "coactivation", "router"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeBuddies:
    """A written map and what it promises."""

    path: Path
    model: str
    profile: Path
    k: int
    by: By
    summary: "BuddySummary"


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
            help="What makes a good stand-in: the error it leaves (output), alike outputs (cka, "
            "cosine), being chosen together (coactivation) or by the same tokens (router).",
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
        may_replace = out is not None
        out = out or buddies_path(profiles, profile)
        made = make_buddies(profile, k=k, by=by, out=out, may_replace=may_replace)

        from moe_tool.reports.terminal import buddies_table

        output.show(
            "what a stand-in leaves as error, relative to the expert's output (1: all of it)",
            buddies_table(made.summary.layers, made.summary),
        )
        output.say(
            f"wrote {made.path}: {format_bytes(made.path.stat().st_size)}; {k} stand-ins "
            f"per expert by {by}, {output.seconds:.1f} s"
        )
        output.say(
            f"next: {_pack_command(made, is_default=out == buddies_path(profiles, profile))}"
        )
        output.result(buddies_fields(made))


def _pack_command(made: MadeBuddies, *, is_default: bool) -> str:
    from moe_tool.models.locate import model_to_type

    files = "" if is_default else f" --profile {made.profile} --buddies {made.path}"
    return f"moe-tool pack {model_to_type(made.model)}{files} --out bundle/"


def make_buddies(
    profile: Path, *, k: int, by: By, out: Path, may_replace: bool = True
) -> MadeBuddies:
    """Build the map of a profile and write it to `out`.

    Raises:
        NotFoundError, CorruptArtifactError: the profile.
        UsageError: k is not below the number of experts, or `out` is another model's map and must
            not be replaced.
    """
    from moe_tool.buddies.build_buddy_map import build_buddy_map
    from moe_tool.buddies.summary import summarize_buddies
    from moe_tool.formats.claimed_artifact import require_unclaimed
    from moe_tool.formats.json_artifact import write_json_artifact
    from moe_tool.formats.profile_hdf5 import ProfileReader

    with ProfileReader.open(profile) as reader:
        if not may_replace:
            require_unclaimed(out, reader.header.identity)
        buddy_map = build_buddy_map(reader, k=k, by=by)
        summary = summarize_buddies(reader, buddy_map)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json_artifact(out, buddy_map)
    return MadeBuddies(
        path=out, model=buddy_map.identity.name, profile=profile, k=k, by=by, summary=summary
    )


def buddies_fields(made: MadeBuddies) -> dict[str, object]:
    """Return the fields of `--json`."""
    return {
        "buddies": made.path,
        "profile": made.profile,
        "k": made.k,
        "by": made.by,
        "price_in_sample": made.summary.price_in_sample,
        "price_held_out": made.summary.price_held_out,
        "price_best_held_out": made.summary.price_best_held_out,
        "price_drop": made.summary.price_drop,
    }
