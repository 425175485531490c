"""Default profile of a command."""

from pathlib import Path

from moe_tool.artifact_folder import PROFILE_SUFFIX, newest_artifact
from moe_tool.cli.console import Output
from moe_tool.errors import NotFoundError


def newest_profile(folder: Path, output: Output) -> Path:
    """Return the newest profile of a folder, and print which.

    Raises:
        NotFoundError: there is none.
    """
    found = newest_artifact(folder, PROFILE_SUFFIX)
    if found is None:
        raise NotFoundError(
            f"there is no profile in {folder}/",
            hint="make one first: moe-tool profile demo --data builtin",
        )
    output.say(f"profile: {found} (the newest in {folder}/)")
    return found
