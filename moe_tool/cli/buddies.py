"""`moe-tool buddies`: a profile in, a map of stand-ins out."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from moe_tool.artifact_folder import DEFAULT_FOLDER
from moe_tool.cli.console import Output, open_output
from moe_tool.cli.options import JsonOption, ProfilesOption

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
    """Find for every expert the K best stand-ins, each with scale and price."""
    with open_output(as_json=json) as output:
        _buddies(profile or _newest_profile(profiles, output), k, by, out, profiles, output)


def _buddies(
    profile: Path, k: int, by: By, out: Path | None, profiles: Path, output: Output
) -> None:
    from moe_tool.artifact_folder import buddies_path
    from moe_tool.buddies.build_buddy_map import build_buddy_map
    from moe_tool.formats.json_artifact import write_json_artifact
    from moe_tool.formats.profile_hdf5 import ProfileReader

    out = out or buddies_path(profiles, profile)
    with ProfileReader.open(profile) as reader:
        buddy_map, summary = build_buddy_map(reader, k=k, by=by)
        model = reader.header.identity.name
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json_artifact(out, buddy_map)


def _newest_profile(folder: Path, output: Output) -> Path:
    from moe_tool.artifact_folder import PROFILE_SUFFIX, newest_artifact
    from moe_tool.errors import NotFoundError

    found = newest_artifact(folder, PROFILE_SUFFIX)
    if found is None:
        raise NotFoundError(
            f"there is no profile in {folder}/",
            hint="make one first: moe-tool profile demo --data builtin",
        )
    output.say(f"profile: {found} (the newest in {folder}/)")
    return found
