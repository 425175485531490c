"""Where the verbs keep their artifacts, and which of them is the newest that fits."""

import re
from collections.abc import Callable
from pathlib import Path

DEFAULT_FOLDER = Path("profiles")
PROFILE_SUFFIX = ".h5"
BUDDIES_SUFFIX = ".buddies.json"
PLAN_SUFFIX = ".plan.json"
BIT_PRICES_SUFFIX = ".bits.json"


def profile_path(folder: Path, model_name: str) -> Path:
    """Return where the profile of a model goes: `profiles/NAME.h5`, any slash made harmless."""
    return folder / f"{_file_stem(model_name)}{PROFILE_SUFFIX}"


def buddies_path(folder: Path, profile: Path) -> Path:
    """Return where the buddy map made from `profile` goes: `profiles/NAME.buddies.json`."""
    return folder / f"{profile.name.removesuffix(PROFILE_SUFFIX)}{BUDDIES_SUFFIX}"


def plan_path(folder: Path, profile: Path) -> Path:
    """Return where the plan made from `profile` goes: `profiles/NAME.plan.json`."""
    return folder / f"{profile.name.removesuffix(PROFILE_SUFFIX)}{PLAN_SUFFIX}"


def bit_prices_path(folder: Path, profile: Path, quantizer: str) -> Path:
    """Return where a quantizer's errors at each width go: `profiles/NAME.gptq.bits.json`."""
    stem = profile.name.removesuffix(PROFILE_SUFFIX)
    return folder / f"{stem}.{quantizer}{BIT_PRICES_SUFFIX}"


def newest_artifact(
    folder: Path, suffix: str, *, fits: Callable[[Path], bool] = lambda path: True
) -> Path | None:
    """Return the newest file of one kind that fits, None where there is none.

    Args:
        folder: looked in, not below; may be missing.
        suffix: PROFILE_SUFFIX or BUDDIES_SUFFIX.
        fits: asked from the newest to the oldest until it says yes; not asked about hidden files.
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


def _file_stem(model_name: str) -> str:
    stem = re.sub(r"[^\w.-]+", "--", model_name.strip("/")).lstrip(".-")
    return stem or "model"
