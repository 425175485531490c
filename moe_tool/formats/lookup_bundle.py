"""Lookup bundle on disk: every check before its weights are read, its skeleton and its rows."""

from collections.abc import Mapping
from pathlib import Path

import xxhash

from moe_tool.artifacts.lookup_manifest import LOOKUP_KIND, LookupManifest
from moe_tool.formats.block_hashes import CheckedBlocks
from moe_tool.formats.bundle_checks import check_files, corrupt_bundle, require_finished
from moe_tool.formats.bundle_files import MANIFEST
from moe_tool.formats.hostile_file import quoted, reading
from moe_tool.formats.json_artifact import json_artifact_kind, read_json_artifact
from moe_tool.formats.safetensors_index import Checkpoint, TensorInfo, read_header
from moe_tool.formats.table_rows import TableRows
from moe_tool.quantization.row_codes import RowCodes

SKELETON_FILE = "skeleton.safetensors"
ROWS_FILE = "rows.safetensors"
ROWS_TENSOR = "rows"


def is_lookup_bundle(folder: Path) -> bool:
    """Return whether a folder's manifest is that of a lookup bundle; nothing else is checked.

    Raises:
        CorruptArtifactError, StorageError: the manifest is no JSON object that can be read.
    """
    path = folder / MANIFEST
    return path.is_file() and json_artifact_kind(path) == LOOKUP_KIND


class LookupBundle:
    """An open lookup bundle, whose manifest fits its files."""

    def __init__(
        self,
        folder: Path,
        manifest: LookupManifest,
        skeleton: Mapping[str, TensorInfo],
        rows: TensorInfo,
    ) -> None:
        """Use `open`."""
        self.folder, self.manifest = folder, manifest
        self.codes = RowCodes(form=manifest.form, width=manifest.row_width)
        self._skeleton, self._rows = skeleton, rows

    @classmethod
    def open(cls, folder: Path, *, is_finished: bool = True) -> "LookupBundle":
        """Open a bundle after checking its manifest against its files; no weight is read.

        Args:
            folder: the bundle.
            is_finished: whether a bundle that is still being written is refused.

        Raises:
            NotFoundError: there is no such folder.
            CorruptArtifactError: it is half-written, foreign or damaged.
            ArtifactVersionError: its manifest has another schema version.
            StorageError: it cannot be read.
        """
        with reading(folder):
            if is_finished:
                require_finished(folder)
            manifest = read_json_artifact(folder / MANIFEST, LookupManifest)
            check_files(folder, manifest.files)
        for name in (SKELETON_FILE, ROWS_FILE):
            if name not in {file.name for file in manifest.files}:
                raise corrupt_bundle(f"{folder / MANIFEST} does not list {name}")
        skeleton = read_header(folder / SKELETON_FILE)
        if skeleton.keys() != {tensor.name for tensor in manifest.skeleton}:
            raise corrupt_bundle(
                f"{folder / SKELETON_FILE} does not hold the tensors that {MANIFEST} lists"
            )
        return cls(folder, manifest, skeleton, _rows(folder, manifest))

    @property
    def paths(self) -> list[Path]:
        """Files that hold the bundle"""
        return [self.folder / file.name for file in self.manifest.files]

    def open_skeleton(self) -> Checkpoint:
        """Open everything but the experts; reading a tensor that differs from the packed one raises
        a CorruptArtifactError that names it."""
        checkpoint = Checkpoint(self._skeleton)
        hashes = {tensor.name: tensor.xxh3 for tensor in self.manifest.skeleton}

        def check(name: str, row: int | None, data: memoryview) -> None:
            assert row is None
            if xxhash.xxh3_64_hexdigest(data) != hashes[name]:
                file = checkpoint.tensors[name].file
                raise corrupt_bundle(f"{file} is damaged: the hash of {quoted(name)} does not fit")

        checkpoint.on_read = check
        checkpoint.requires_finite = True
        return checkpoint

    def open_rows(self) -> TableRows:
        """Open the table, of which nothing is read yet; see `TableRows.open`."""
        blocks = CheckedBlocks(self.manifest.rows, self._rows)
        return TableRows.open([self._rows], {}, {ROWS_TENSOR: blocks})


def _rows(folder: Path, manifest: LookupManifest) -> TensorInfo:
    """Return the place of the table, whose shape has to be the manifest's."""
    path = folder / ROWS_FILE
    found = read_header(path)
    codes = RowCodes(form=manifest.form, width=manifest.row_width)
    if codes.row_bytes != manifest.row_bytes:
        raise corrupt_bundle(
            f"{folder / MANIFEST} says a row has {manifest.row_bytes} bytes, {manifest.row_width} "
            f"values as {manifest.form} have {codes.row_bytes}"
        )
    rows, shape = found.get(ROWS_TENSOR), (manifest.vocabulary, manifest.row_bytes)
    if rows is None or len(found) > 1:
        raise corrupt_bundle(f"{path} does not hold one tensor {quoted(ROWS_TENSOR)} alone")
    if rows.dtype != "U8" or rows.shape != shape:
        raise corrupt_bundle(
            f"{path}: the table is {rows.dtype} {list(rows.shape)}, wanted U8 {list(shape)}"
        )
    wanted = -(-rows.size_bytes // manifest.rows.block_bytes)
    if manifest.rows.n_blocks != wanted:
        raise corrupt_bundle(
            f"{folder / MANIFEST} has {manifest.rows.n_blocks} hashes of the table, whose blocks "
            f"are {wanted}"
        )
    return rows
