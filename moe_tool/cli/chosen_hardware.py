"""Hardware profile that predictions use."""

from pathlib import Path
from typing import TYPE_CHECKING

from moe_tool.cli.console import Output

if TYPE_CHECKING:
    from moe_tool.artifacts.hardware_profile import HardwareProfile

_FALLBACK = "laptop-16gb"


def chosen_hardware(named: str | None, profiles: Path, output: Output) -> "HardwareProfile":
    """Return the profile that `--hardware` names or this machine's, and print which.

    Without either, return a data sheet's: hit rates and bytes do not depend on it.

    Raises:
        UsageError: no file and no shipped profile has this name.
        CorruptArtifactError: the file is damaged or no hardware profile.
    """
    from moe_tool.artifacts.hardware_profile import HardwareProfile
    from moe_tool.formats.json_artifact import read_json_artifact
    from moe_tool.hardware.shipped import SHEETS, shipped_profile

    path = profiles / "hardware.json" if named is None else Path(named)
    if named in SHEETS or (named is None and not path.exists()):
        name = named or _FALLBACK
        output.say(
            f"hardware: {name}, from data sheets"
            + ("" if named else "; moe-tool hardware measures this machine")
        )
        return shipped_profile(name)
    if not path.exists():
        return shipped_profile(str(named))  # raises, listing the known names
    found = read_json_artifact(path, HardwareProfile)
    output.say(f"hardware: {path} ({found.name}, {found.source})")
    return found
