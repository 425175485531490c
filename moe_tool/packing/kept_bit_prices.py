"""Bit prices kept beside a profile; missing ones are measured in a pass over the model."""

from collections.abc import Callable
from pathlib import Path

from moe_tool.artifact_folder import bit_prices_path
from moe_tool.artifacts.bit_prices import BitPrices
from moe_tool.artifacts.pack_plan import Quantizer
from moe_tool.errors import ArtifactVersionError, MoeToolError, NotFoundError
from moe_tool.formats.claimed_artifact import require_unclaimed
from moe_tool.formats.json_artifact import read_json_artifact, write_json_artifact
from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.models.locate import LocatedModel, locate_model
from moe_tool.packing.measure_bit_prices import measure_bit_prices
from moe_tool.progress import Progress


def kept_bit_prices(
    profile: ProfileReader,
    quantizer: Quantizer,
    *,
    folder: Path,
    model: str | None,
    offline: bool,
    announce: Callable[[str], None],
    progress: Progress,
) -> BitPrices:
    """Return the kept prices of a profile, or measure and keep them.

    Args:
        model: the checkpoint to measure on; None: found by the profile's name.
        announce: told in one line what is read, measured and written.

    Raises:
        NotFoundError: the checkpoint to measure on is missing.
        CorruptArtifactError, WrongModelError: an input is damaged or of another model.
        UsageError: another model's prices have the same file name.
    """
    path = bit_prices_path(folder, profile.path, quantizer)
    kept = _read(path, announce)
    if kept is not None:
        if kept.profile_sha256 == profile.sha256 and kept.quantizer == quantizer:
            announce(f"bit prices: {path}, measured with {quantizer}")
            return kept
        announce(f"bit prices: {path} is of another profile and is measured again")
    identity = profile.header.identity
    require_unclaimed(path, identity, remedy=f"--profiles {path.parent / identity.quick[:12]}")
    located = _locate(profile.header.identity.name, quantizer, model, offline, announce)
    announce(f"bit prices: every expert at 1 to 4 bits with {quantizer}, one pass, kept for later")
    found = measure_bit_prices(located, profile, quantizer, progress=progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_artifact(path, found)
    announce(f"wrote {path}")
    return found


def _read(path: Path, announce: Callable[[str], None]) -> BitPrices | None:
    if not path.exists():
        return None
    try:
        return read_json_artifact(path, BitPrices)
    except ArtifactVersionError:
        announce(f"bit prices: {path} is of an older version and is measured again")
        return None


def _locate(
    name: str,
    quantizer: Quantizer,
    model: str | None,
    offline: bool,
    announce: Callable[[str], None],
) -> LocatedModel:
    try:
        return locate_model(model or name, offline=offline, announce=announce)
    except MoeToolError as error:
        if model is not None:
            raise
        raise NotFoundError(
            f"the loss of {quantizer} at each width is measured on the model, and {name} was not "
            "found by its name",
            hint="add --model PATH, the checkpoint that was profiled",
        ) from error
