"""Check a bundle's folder before a byte of its weights is read."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_tool.artifacts.bundle_manifest import BundleFile, BundleManifest
from moe_tool.artifacts.bundle_sections import unknown_required
from moe_tool.artifacts.form_table import FormTable
from moe_tool.artifacts.source_files import Part, SourceFiles, parse_parts
from moe_tool.errors import ArtifactVersionError, CorruptArtifactError
from moe_tool.formats.bundle_files import JOURNAL, MANIFEST, PART_SUFFIX, partial_folder
from moe_tool.formats.given_kind import Given, kind_of
from moe_tool.formats.hostile_file import quoted, reading
from moe_tool.formats.integer_parts import IntegerPart, integer_parts
from moe_tool.formats.json_artifact import read_json_artifact
from moe_tool.formats.mask_router_file import MASK_ROUTER_NAME
from moe_tool.formats.policy_names import named_miss_policy, require_plan_names
from moe_tool.formats.record_form import RecordForm, record_form
from moe_tool.formats.record_sources import require_filled
from moe_tool.formats.safetensors_index import Checkpoint, TensorInfo, read_header
from moe_tool.formats.wrong_kind import wrong_kind

# Suffixes of files that a loader of models or tokenizers may pick up by name alone.
_LOADABLE = (".json", ".jinja", ".model", ".safetensors", ".txt", ".py", ".bin", ".pt", ".pth")
REPACK = "remove the folder and pack the bundle again with moe-tool pack"


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleForm:
    """One form of a bundle's experts."""

    index: int
    """Position among the forms of the bundle"""
    table: FormTable
    form: RecordForm[Any]
    parts: tuple[tuple[Part, ...], ...] | None = None
    """Parts of each record in the checkpoint's files; None: records are in the bundle's own"""

    @property
    def record_size_bytes(self) -> int:
        """Size of each record"""
        return self.table.record_size_bytes

    @property
    def size_bytes(self) -> int:
        """Size of all records"""
        return self.table.size_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedBundle:
    """A manifest that fits the files of its folder."""

    manifest: BundleManifest
    forms: tuple[BundleForm, ...]
    """Forms in the order of the manifest's tables"""
    skeleton: Mapping[str, TensorInfo]
    sources: SourceFiles | None
    """Files of the checkpoint that hold records"""


def check_bundle(folder: Path, *, is_finished: bool = True) -> CheckedBundle:
    """Check a manifest against names, sizes and headers of its files.

    Args:
        folder: the bundle.
        is_finished: whether a bundle that is still being written is refused.

    Raises:
        NotFoundError: there is no such folder.
        CorruptArtifactError: it is half-written, foreign or damaged.
        ArtifactVersionError: its manifest has another schema version.
        StorageError: it cannot be read.
    """
    if is_finished:
        with reading(folder):
            require_finished(folder)
    try:
        manifest = read_json_artifact(folder / MANIFEST, BundleManifest)
    except CorruptArtifactError:
        if (given := kind_of(folder)).kind == "lookup-bundle":
            raise wrong_kind(folder, given, "bundle") from None
        raise
    _require_known_sections(folder, manifest)
    _check_policies(folder, manifest)
    sources = manifest.sources
    forms = _forms(folder, manifest, sources)
    with reading(folder):
        check_files(folder, manifest.written_files)
    for form in forms:
        # A base lies inside the tensors of the primary record.
        if form.table.role != "base" and form.parts is None:
            _check_headers(folder, form)
    skeleton = _check_skeleton(folder, manifest)
    return CheckedBundle(manifest=manifest, forms=forms, skeleton=skeleton, sources=sources)


def corrupt_bundle(complaint: str) -> CorruptArtifactError:
    """Return the error for a damaged bundle."""
    return CorruptArtifactError(complaint, hint=REPACK)


def require_finished(folder: Path) -> None:
    """Refuse a folder that is no bundle, or a half-written one.

    Raises:
        NotFoundError, CorruptArtifactError: as `check_bundle`.
    """
    resume = "run the command that began it again, moe-tool pack or tune weights: it resumes"
    names = _names(folder)
    if names is None:
        if partial_folder(folder).is_dir():
            raise CorruptArtifactError(
                f"{folder} is half-written ({partial_folder(folder)} is there)", hint=resume
            )
        raise wrong_kind(folder, Given(kind="missing"), "bundle")
    if folder.name.endswith(PART_SUFFIX) or JOURNAL in names:
        raise CorruptArtifactError(f"{folder} is a half-written bundle", hint=resume)
    if MANIFEST not in names:
        raise wrong_kind(folder, kind_of(folder), "bundle")
    if (folder / MANIFEST).is_symlink():
        raise corrupt_bundle(f"{folder / MANIFEST} is a link, not a file of the bundle")


def _names(folder: Path) -> set[str] | None:
    try:
        return {entry.name for entry in os.scandir(folder)}
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        raise wrong_kind(folder, kind_of(folder), "bundle") from error


def check_files(folder: Path, files: Sequence[BundleFile]) -> None:
    """Require every listed file in full, and no other file that could be loaded.

    Raises:
        CorruptArtifactError: a file is missing, of another size, damaged or not listed.
    """
    if MANIFEST in {file.name for file in files}:
        raise corrupt_bundle(f"{folder / MANIFEST} lists itself")
    for file in files:
        path = folder / file.name
        if path.is_symlink():
            raise corrupt_bundle(f"{path} is a link, not a file of the bundle")
        if not path.is_file():
            raise corrupt_bundle(f"{path} is missing or not a file")
        found = path.stat().st_size
        if found != file.size_bytes:
            raise corrupt_bundle(f"{path} has {found} bytes, its manifest says {file.size_bytes}")
        # A config changes the text as weights do, and is small enough to hash at every start.
        is_small = not file.name.endswith(".safetensors")
        if is_small and hashlib.sha256(path.read_bytes()).hexdigest() != file.sha256:
            raise corrupt_bundle(f"{path} is damaged: its sha256 does not fit")
    listed = {MANIFEST, *(file.name for file in files)}
    for name in sorted(_names(folder) or ()):
        is_left_over = name.startswith(".") or MASK_ROUTER_NAME.fullmatch(name) is not None
        if name not in listed and name.endswith(_LOADABLE) and not is_left_over:
            raise CorruptArtifactError(
                f"{folder / name} is not listed in {MANIFEST}", hint=f"remove it, or {REPACK}"
            )


def _require_known_sections(folder: Path, manifest: BundleManifest) -> None:
    unknown = unknown_required(manifest.sections)
    if unknown:
        raise ArtifactVersionError(
            f"{folder / MANIFEST} requires the section {quoted(unknown[0])}, which this version of "
            "moe-tool does not know",
            hint=f"run the version that wrote it, {quoted(manifest.tool_version)}, or {REPACK}",
        )


def _check_policies(folder: Path, manifest: BundleManifest) -> None:
    """Refuse a manifest that names unknown policies."""
    if manifest.plan is not None:
        require_plan_names(folder / MANIFEST, manifest.plan, remedy=REPACK)
    if manifest.calibration is not None:
        named_miss_policy(folder / MANIFEST, manifest.calibration.policy, remedy=REPACK)


def _forms(
    folder: Path, manifest: BundleManifest, sources: SourceFiles | None
) -> tuple[BundleForm, ...]:
    """Return the manifest's forms after comparing their record sizes with their tensors."""
    found = []
    placed = {} if sources is None else {table.form: table.parts for table in sources.tables}
    for index, table in enumerate(manifest.forms):
        try:
            form = record_form(manifest.shape, table.precision, table.role)
        except CorruptArtifactError as error:
            raise corrupt_bundle(f"{folder / MANIFEST}: {error.message}") from error
        if form.layout.size_bytes != table.record_size_bytes:
            raise corrupt_bundle(
                f"{folder / MANIFEST} says a record has {table.record_size_bytes} bytes, "
                f"its tensors need {form.layout.size_bytes}"
            )
        parts = tuple(map(parse_parts, placed[index])) if index in placed else None
        try:
            for each in parts or ():
                require_filled(each, form.layout)
        except ValueError as error:
            raise corrupt_bundle(f"{folder / MANIFEST}: {error}") from error
        found.append(BundleForm(index=index, table=table, form=form, parts=parts))
    return tuple(found)


def _check_headers(folder: Path, held: BundleForm) -> None:
    headers = {name: read_header(folder / name) for name in {r.file for r in held.table.records}}
    for record in held.table.records:
        for segment in held.form.layout.segments:
            name = f"layer.{record.layer}.expert.{record.expert}.{segment.name}"
            info = headers[record.file].pop(name, None)
            if (
                info is None
                or info.dtype != "U8"
                or info.offset != record.offset + segment.offset
                or info.size_bytes != segment.size_bytes
            ):
                raise corrupt_bundle(
                    f"{folder / record.file} does not hold {name} where {MANIFEST} says"
                )
    for file, left in headers.items():
        if left:
            raise corrupt_bundle(
                f"{folder / file} holds {quoted(min(left))}, which is no part of a record"
            )


def _check_skeleton(folder: Path, manifest: BundleManifest) -> Mapping[str, TensorInfo]:
    """Require the listed tensors in the skeleton files, and codes of the right dtype and shape."""
    tensors = Checkpoint.open_files(skeleton_files(folder, manifest)).tensors
    if tensors.keys() != {tensor.name for tensor in manifest.skeleton}:
        raise corrupt_bundle(
            f"the skeleton files of {folder} do not hold the tensors that {MANIFEST} lists"
        )
    for part in skeleton_parts(manifest):
        found = tensors.get(part.name)
        if found is None:
            raise corrupt_bundle(f"the skeleton of {folder} lacks {quoted(part.name)}")
        if found.dtype != part.safetensors_dtype or found.shape != part.shape:
            raise corrupt_bundle(
                f"{found.file}: {quoted(part.name)} is {found.dtype} {list(found.shape)}, "
                f"wanted {part.safetensors_dtype} {list(part.shape)}"
            )
    tuned = manifest.tuned_floats
    for name in () if tuned is None else tuned.tensors:
        if tensors[name].dtype != "F32":
            raise corrupt_bundle(
                f"{tensors[name].file}: {quoted(name)} is {tensors[name].dtype}, wanted F32 of a "
                "trained tensor"
            )
    _check_tables(folder, manifest, tensors)
    return tensors


def _check_tables(
    folder: Path, manifest: BundleManifest, tensors: Mapping[str, TensorInfo]
) -> None:
    """Require as many hashes of a table's blocks as it has blocks."""
    tables = manifest.row_tables
    for part in () if tables is None else tables.parts:
        wanted = -(-tensors[part.tensor].size_bytes // part.block_bytes)
        if part.n_blocks != wanted:
            raise corrupt_bundle(
                f"{folder / MANIFEST} has {part.n_blocks} hashes of {quoted(part.tensor)}, "
                f"whose blocks are {wanted}"
            )


def skeleton_parts(manifest: BundleManifest) -> list[IntegerPart]:
    """Return the stored tensors of the skeleton's quantized matrices."""
    precision = manifest.skeleton_precision
    if precision.kind != "integer":
        return []
    return [
        part
        for linear in manifest.skeleton_linears
        for part in integer_parts(linear.parameter, linear.n_outputs, linear.n_inputs, precision)
    ]


def skeleton_files(folder: Path, manifest: BundleManifest) -> list[Path]:
    """Return the files of the skeleton."""
    names = [file.name for file in manifest.files]
    return [
        folder / name
        for name in names
        if name.startswith("skeleton-") and name.endswith(".safetensors")
    ]
