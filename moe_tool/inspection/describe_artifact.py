"""Description of any artifact: find its kind and call the function for it."""

from pathlib import Path

from moe_tool.artifact_folder import BUDDIES_SUFFIX, PROFILE_SUFFIX
from moe_tool.errors import CorruptArtifactError, NotFoundError
from moe_tool.formats.given_kind import kind_of
from moe_tool.formats.json_artifact import json_artifact_kind
from moe_tool.formats.lookup_bundle import is_lookup_bundle
from moe_tool.formats.run_trace_hdf5 import is_run_trace
from moe_tool.inspection.describe_bundle import describe_bundle
from moe_tool.inspection.describe_json import (
    describe_bit_prices,
    describe_buddies,
    describe_hardware,
    describe_plan,
)
from moe_tool.inspection.describe_lookup import describe_lookup
from moe_tool.inspection.describe_traces import describe_profile, describe_run_trace
from moe_tool.inspection.description import Description, model_facts, shape_facts
from moe_tool.progress import Progress

_PARTIAL_BUNDLE = ".part"
_PARTIAL_PROFILE = ".parts"
_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"


def describe_artifact(path: Path, *, verify: bool, progress: Progress) -> Description:
    """Return the description of the artifact at `path`.

    Args:
        path: a profile, buddy map, plan, hardware profile, run trace, bundle, half-written bundle
            or checkpoint.
        verify: read everything and check every hash, not only headers and sizes.

    Raises:
        NotFoundError: there is no such file or folder.
        CorruptArtifactError: it is damaged or of no known kind.
        ArtifactVersionError: it has another format version.
    """
    if not path.exists():
        raise NotFoundError(f"there is nothing at {path}", hint="ls profiles/ shows what there is")
    if path.is_dir():
        return _describe_folder(path, verify=verify, progress=progress)
    with path.open("rb") as file:
        is_hdf5 = file.read(len(_HDF5_MAGIC)) == _HDF5_MAGIC
    if is_hdf5:
        if is_run_trace(path):
            return describe_run_trace(path)
        return describe_profile(path, progress)
    if path.name.endswith(PROFILE_SUFFIX):
        return describe_profile(path, progress)
    if path.name == "manifest.json":
        return _describe_packed(path.parent, verify=verify, progress=progress)
    if path.name.endswith((BUDDIES_SUFFIX, ".json")):
        return _describe_json(path)
    raise _unknown(path)


def _describe_folder(path: Path, *, verify: bool, progress: Progress) -> Description:
    if path.name.endswith(_PARTIAL_BUNDLE):
        return _unfinished(path, "half-written bundle", "the same moe-tool pack command")
    if path.name.endswith(_PARTIAL_PROFILE):
        return _unfinished(path, "half-written profile", "moe-tool profile ... --resume")
    if (path / "manifest.json").exists() or any(path.glob("experts-*.safetensors")):
        return _describe_packed(path, verify=verify, progress=progress)
    if (path / "config.json").exists():
        return _describe_checkpoint(path)
    raise _unknown(path)


def _describe_packed(path: Path, *, verify: bool, progress: Progress) -> Description:
    describe = describe_lookup if is_lookup_bundle(path) else describe_bundle
    return describe(path, verify=verify, progress=progress)


def _describe_json(path: Path) -> Description:
    describe = {
        "bit-prices": describe_bit_prices,
        "buddies": describe_buddies,
        "hardware": describe_hardware,
        "plan": describe_plan,
    }.get(json_artifact_kind(path) or "")
    if describe is not None:
        return describe(path)
    if path.name.endswith(BUDDIES_SUFFIX):
        return describe_buddies(path)  # raises, saying what is wrong
    raise _unknown(path)


def _describe_checkpoint(path: Path) -> Description:
    from moe_tool.models.architecture import open_model
    from moe_tool.models.locate import LocatedModel

    opened = open_model(LocatedModel(folder=path, name=path.resolve().name))
    with opened.checkpoint:
        facts = model_facts(opened.identity) | shape_facts(opened.shape)
        facts |= {"format": opened.format_name}
        facts |= {"bytes": opened.checkpoint.total_bytes, "tensors": len(opened.checkpoint.tensors)}
    checked = "headers; a checkpoint carries no hashes"
    return Description(kind="checkpoint", path=path, checked=checked, facts=facts)


def _unfinished(path: Path, kind: str, remedy: str) -> Description:
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    return Description(
        kind=kind,
        path=path,
        is_intact=False,
        checked=f"unfinished: continue with {remedy}",
        facts={"bytes": size},
    )


def _unknown(path: Path) -> CorruptArtifactError:
    return CorruptArtifactError(
        f"{path} is {kind_of(path).label}, not a profile, buddy map, plan, hardware profile, trace "
        "of a run, bundle or checkpoint",
        hint="a checkpoint folder has a config.json, a bundle a manifest.json",
    )
