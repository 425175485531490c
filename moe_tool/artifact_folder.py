"""Default paths of the commands' artifacts, and the newest file that fits."""

import re
from collections.abc import Callable
from pathlib import Path

DEFAULT_FOLDER = Path("profiles")
PROFILE_SUFFIX = ".h5"
BUDDIES_SUFFIX = ".buddies.json"
PLAN_SUFFIX = ".plan.json"
BIT_PRICES_SUFFIX = ".bits.json"


def profile_path(folder: Path, model_name: str) -> Path:
    """Return the profile's path: `profiles/NAME.h5`, slashes and odd characters replaced."""
    stem = re.sub(r"[^\w.-]+", "--", model_name.strip("/")).lstrip(".-")
    return folder / f"{stem or 'model'}{PROFILE_SUFFIX}"


def buddies_path(folder: Path, profile: Path) -> Path:
    """Return the path of the buddy map made from `profile`: `profiles/NAME.buddies.json`."""
    return folder / f"{profile.name.removesuffix(PROFILE_SUFFIX)}{BUDDIES_SUFFIX}"


def plan_path(folder: Path, profile: Path) -> Path:
    """Return the path of the plan made from `profile`: `profiles/NAME.plan.json`."""
    return folder / f"{profile.name.removesuffix(PROFILE_SUFFIX)}{PLAN_SUFFIX}"


def bit_prices_path(folder: Path, profile: Path, quantizer: str) -> Path:
    """Return the path of a quantizer's errors by width: `profiles/NAME.gptq.bits.json`."""
    stem = profile.name.removesuffix(PROFILE_SUFFIX)
    return folder / f"{stem}.{quantizer}{BIT_PRICES_SUFFIX}"


def newest_artifact(
    folder: Path, suffix: str, *, fits: Callable[[Path], bool] = lambda path: True
) -> Path | None:
    """Return the newest file with a suffix that fits, or None.

    Args:
        folder: searched without its subfolders; may be missing.
        suffix: PROFILE_SUFFIX or BUDDIES_SUFFIX.
        fits: called from the newest file to the oldest until it returns True; hidden files are
            skipped.
    """
    if not folder.is_dir():
        return None
    found = [
        path
        for path in folder.iterdir()
        if path.name.endswith(suffix) and not path.name.startswith(".") and path.is_file()
    ]
    found.sort(key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)
    return next((path for path in found if fits(path)), None)
