"""Reader of a bundle: checks the manifest against the files, then each record as it is read."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import xxhash

from moe_tool.artifacts.form_table import FormRecord
from moe_tool.artifacts.mask_router import MaskRouter
from moe_tool.artifacts.source_files import Part
from moe_tool.errors import CorruptArtifactError, StorageError
from moe_tool.formats.bundle_checks import (
    REPACK,
    BundleForm,
    CheckedBundle,
    check_bundle,
    corrupt_bundle,
    skeleton_parts,
)
from moe_tool.formats.bundle_files import record_file_header
from moe_tool.formats.bundle_tables import BundleTables
from moe_tool.formats.channel_form import require_chunks
from moe_tool.formats.finite_numbers import are_finite
from moe_tool.formats.hostile_file import quoted, reading
from moe_tool.formats.mask_router_file import read_mask_router
from moe_tool.formats.record_files import ChannelRead, OnPiece, RecordFiles
from moe_tool.formats.record_sources import SOURCE_AGAIN, RecordSources
from moe_tool.formats.safetensors_index import Checkpoint
from moe_tool.progress import SILENT, Progress
from moe_tool.quantization.channels import ChannelWeight

GoOn = Callable[[int], bool]
"""Callback after every piece of a record, with its bytes; returning False cancels the read."""

_CHECK_DISK = "check the disk"
_HASH_BLOCK_BYTES = 16 * 2**20


class BundleReader:
    """An open bundle. Reading is safe from several threads."""

    def __init__(self, folder: Path, checked: CheckedBundle) -> None:
        """Use `open`."""
        self.folder = folder
        self.manifest = checked.manifest
        self.forms = checked.forms
        """Forms in the order of `manifest.forms`"""
        self._skeleton = checked.skeleton
        self.tables = BundleTables(checked.manifest, checked.skeleton)
        """Embedding tables that are read row by row"""
        self._verified: set[tuple[int, int, int]] = set()  # records whose hash was found right
        self._verified_channels: dict[tuple[int, int], np.ndarray] = {}  # [I] bool
        self._expected: set[tuple[int, int]] = set()  # records that the system was advised of
        self._entries = {
            (held.index, record.layer, record.expert): record
            for held in self.forms
            for record in held.table.records
        }
        self._primary_form = {
            (record.layer, record.expert): held.index
            for held in self.forms
            if held.table.role == "primary"
            for record in held.table.records
        }
        self._parts: dict[tuple[int, int, int], tuple[Part, ...]] = {
            (held.index, record.layer, record.expert): parts
            for held in self.forms
            if held.parts is not None
            for record, parts in zip(held.table.records, held.parts, strict=True)
        }
        self._sources = None if checked.sources is None else RecordSources.open(checked.sources)
        own = {entry.file for key, entry in self._entries.items() if key not in self._parts}
        with reading(folder):
            self._files = RecordFiles(folder, sorted(own))

    @classmethod
    def open(cls, folder: Path, *, is_finished: bool = True) -> "BundleReader":
        """Open a bundle after checking its manifest against names, sizes and headers of its files.

        Args:
            folder: the bundle.
            is_finished: whether a bundle that is still being written is refused.

        Raises:
            NotFoundError: there is no such folder.
            CorruptArtifactError: it is half-written, foreign or damaged.
            ArtifactVersionError: its manifest has another schema version.
            StorageError: it cannot be read.
        """
        return cls(folder, check_bundle(folder, is_finished=is_finished))

    @property
    def expert_bytes(self) -> int:
        """Size of the primary records, without channel selectors"""
        return sum(table.size_bytes for table in self.manifest.primaries)

    @property
    def paths(self) -> list[Path]:
        """Files that hold the bundle, the checkpoint's too if records stay there"""
        own = [self.folder / file.name for file in self.manifest.written_files]
        return own if self._sources is None else [*own, *self._sources.paths]

    @property
    def selector_bytes(self) -> int:
        """Size of the channel selectors; 0 where there are none"""
        return sum(table.size_bytes for table in self.manifest.selectors)

    def primary_form(self, layer: int, expert: int) -> BundleForm:
        """Return the primary form of an expert that is stored."""
        return self.forms[self._primary_form[layer, expert]]

    def primary_record_bytes(self, layer: int) -> list[int]:
        """Return the size of each expert's primary record in a layer; 0 for a removed expert."""
        sizes = [0] * self.manifest.shape.experts
        for (at, expert), form in self._primary_form.items():
            if at == layer:
                sizes[expert] = self.forms[form].record_size_bytes
        return sizes

    def open_skeleton(self) -> Checkpoint:
        """Open the skeleton; reading a tensor that differs from the packed one raises a
        CorruptArtifactError that names it."""
        checkpoint = Checkpoint(self._skeleton)
        hashes = {tensor.name: tensor.xxh3 for tensor in self.manifest.skeleton}
        tuned = self.manifest.tuned_floats
        parts = skeleton_parts(self.manifest)
        numbers = {part.name: torch.float16 for part in parts if part.is_factor}
        numbers |= dict.fromkeys(() if tuned is None else tuned.tensors, torch.float32)

        def check(name: str, row: int | None, data: memoryview) -> None:
            assert row is None
            file = checkpoint.tensors[name].file
            if xxhash.xxh3_64_hexdigest(data) != hashes[name]:
                raise corrupt_bundle(f"{file} is damaged: the hash of {quoted(name)} does not fit")
            # A forged file can have the right hash.
            if name in numbers and not are_finite(torch.frombuffer(data, dtype=numbers[name])):
                raise corrupt_bundle(f"{file}: {quoted(name)} holds NaN or infinity")

        checkpoint.on_read = check
        return checkpoint

    def mask_router(self) -> MaskRouter | None:
        """Read the trained mask routers; None if the bundle has none.

        Raises:
            CorruptArtifactError, NotFoundError, StorageError: as `read_mask_router`.
        """
        if self.manifest.pruning is None:
            return None
        return read_mask_router(self.folder, self.manifest)

    def record_entry(self, layer: int, expert: int, *, form: int) -> FormRecord:
        """Return the place of a record."""
        return self._entries[form, layer, expert]

    def read_directly(self) -> str | None:
        """Read records past the page cache from now on; return the reason if that is refused.

        No read may be under way. The file system is asked once.
        """
        return self._files.read_directly()

    def read_record_into(
        self,
        layer: int,
        expert: int,
        out: torch.Tensor,
        *,
        form: int,
        n_there: int = 0,
        go_on: GoOn | None = None,
    ) -> None:
        """Read one record and check it.

        A record that was right once is not hashed again (a quarter of the time of a read) while
        its file is unchanged.

        Args:
            out: uint8 [record_size_bytes], overwritten; 4096-aligned memory saves a copy.
            form: position of the wanted form among `forms`.
            n_there: bytes of the record that `out` already begins with.
            go_on: asked after each piece; if it cancels the read, `out` holds anything.

        Raises:
            CorruptArtifactError: the bytes are not those that were packed, or the file is not the
                one that was opened; names layer, expert and file.
            StorageError: the disk does not give them.
        """
        entry = self._entries[form, layer, expert]
        where = self._where(form, entry)
        is_known = (form, layer, expert) in self._verified
        digest = xxhash.xxh3_64()
        if n_there and not is_known:
            digest.update(out[:n_there].numpy().data)

        def look_at(piece: memoryview) -> bool:
            if not is_known:  # one reader hashes a piece while another one's is read
                digest.update(piece)
            return go_on is None or go_on(len(piece))

        in_pieces = None if is_known and go_on is None else look_at
        try:
            count, changed = self._fill(form, entry, out, n_there, in_pieces)
        except OSError as error:
            is_placed = self.forms[form].parts is not None
            raise _disk_error(where, error, SOURCE_AGAIN if is_placed else _CHECK_DISK) from error
        if count is None:
            return
        if n_there + count < out.numel():
            raise StorageError(
                f"{where}: the file ended after {n_there + count} of {out.numel()} bytes",
                hint=REPACK,
            )
        if changed is not None:
            # The manifest in memory may describe another bundle, even if this record is whole.
            raise _changed(where, changed)
        if not is_known:
            self._require_right(form, entry, out, digest.hexdigest())

    def _fill(
        self,
        form: int,
        entry: FormRecord,
        out: torch.Tensor,
        n_there: int,
        on_piece: OnPiece | None,
    ) -> tuple[int | None, str | None]:
        """Read a record; return the bytes read, None if cancelled, and what changed meanwhile."""
        parts = self._parts.get((form, entry.layer, entry.expert))
        if parts is None or self._sources is None:
            offset = entry.offset + n_there
            count = self._files.read_into(entry.file, offset, out[n_there:], on_piece=on_piece)
            has_changed = count is not None and self._files.has_changed(entry.file)
            return count, "the bundle" if has_changed else None
        assert n_there == 0, "a record with a base lies in the bundle"
        layout = self.forms[form].form.layout
        count = self._sources.read_into(parts, layout, out, on_piece=on_piece)
        changed = None if count is None else self._sources.changed_file(parts)
        return count, None if changed is None else f"the checkpoint's {changed}"

    def _require_right(self, form: int, entry: FormRecord, record: torch.Tensor, xxh3: str) -> None:
        if xxh3 != entry.xxh3:
            raise self._damaged(form, entry)
        try:
            self.forms[form].form.require_finite(record)
        except CorruptArtifactError as error:
            raise corrupt_bundle(f"{self._where(form, entry)}: {error.message}") from error
        self._verified.add((form, entry.layer, entry.expert))

    def read_channels_into(
        self,
        layer: int,
        expert: int,
        weight: ChannelWeight,
        channels: np.ndarray,
        *,
        hashes: np.ndarray,
    ) -> ChannelRead:
        """Read some channels of an expert to their places among its chunks, and check each.

        Channels are read in runs through the page cache: one between two wanted channels is read
        along with them if a separate read would cost more. On the first read of a record the
        system is advised to bring in all of it.

        Args:
            weight: the chunks; those of `channels` and of channels read along are overwritten.
            channels: [n] channel numbers, ascending.
            hashes: [I] uint64, as the expert's selector has them.

        Raises:
            CorruptArtifactError, StorageError: as `read_record_into`.
        """
        held = self.primary_form(layer, expert)
        entry = self._entries[held.index, layer, expert]
        where = self._where(held.index, entry)
        try:
            if (layer, expert) not in self._expected:
                self._expected.add((layer, expert))
                self._files.expect(entry.file, entry.offset, held.record_size_bytes)
            read = self._files.read_chunks(entry.file, entry.offset, weight.chunks, channels)
            has_changed = self._files.has_changed(entry.file)
        except OSError as error:
            raise _disk_error(where, error, _CHECK_DISK) from error
        if has_changed:
            raise _changed(where, "the bundle")
        known = self._verified_channels.setdefault(
            (layer, expert), np.zeros(weight.n_channels, dtype=bool)
        )
        unknown = read.channels[~known[read.channels]]
        if len(unknown):
            try:
                require_chunks(weight, unknown, hashes)
            except CorruptArtifactError as error:
                raise corrupt_bundle(f"{where}: {error.message}") from error
            known[unknown] = True
        return read

    def verify_all(self, progress: Progress = SILENT) -> None:
        """Check the sha256 of every file, the hashes of records and tables, and the scales of the
        skeleton.

        Raises:
            CorruptArtifactError: names the first file or record that differs.
        """
        written = self.manifest.written_files
        total = sum(file.size_bytes for file in written)
        progress.begin("verify", total + sum(held.size_bytes for held in self.forms), "bytes")
        for entry in written:
            digest = hashlib.sha256()
            with reading(self.folder / entry.name), open(self.folder / entry.name, "rb") as file:
                while block := file.read(_HASH_BLOCK_BYTES):
                    digest.update(block)
                    progress.advance(len(block))
            if digest.hexdigest() != entry.sha256:
                self._find_damaged_record(entry.name)
                raise corrupt_bundle(
                    f"{self.folder / entry.name} is damaged: its sha256 does not fit"
                )
        with self.open_skeleton() as skeleton:
            for part in skeleton_parts(self.manifest):
                if part.is_factor:
                    skeleton.read(part.name)
        self.tables.verify()
        self.mask_router()
        self._verified.clear()
        self._verified_channels.clear()
        for held in self.forms:
            self._verify_records(held, progress)
        progress.end()

    def _verify_records(self, held: BundleForm, progress: Progress) -> None:
        """Check every record, and the sha256 of files that are not written."""
        out = torch.empty(held.record_size_bytes, dtype=torch.uint8)
        by_file: dict[str, list[FormRecord]] = {}
        for record in held.table.records:
            by_file.setdefault(record.file, []).append(record)
        for name, records in by_file.items():
            keys = [(record.layer, record.expert) for record in records]
            digest = hashlib.sha256(record_file_header(keys, held.form.layout))
            for layer, expert in keys:
                self.read_record_into(layer, expert, out, form=held.index)
                if held.parts is not None:
                    digest.update(out.numpy().data)
                progress.advance(held.record_size_bytes)
            wanted = next(file.sha256 for file in self.manifest.files if file.name == name)
            if held.parts is not None and digest.hexdigest() != wanted:
                raise corrupt_bundle(f"the records of {name} do not fit its sha256")

    def close(self) -> None:
        """Close the files."""
        self._files.close()
        self.tables.close()
        if self._sources is not None:
            self._sources.close()

    def __enter__(self) -> "BundleReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _where(self, form: int, entry: FormRecord) -> str:
        parts = self._parts.get((form, entry.layer, entry.expert))
        path = self.folder / entry.file
        if parts is not None and self._sources is not None:
            path = self._sources.paths[parts[0].file]
        return f"layer {entry.layer} expert {entry.expert} in {path}"

    def _damaged(self, form: int, entry: FormRecord) -> CorruptArtifactError:
        complaint = f"{self._where(form, entry)} is damaged: its hash does not fit"
        if self.forms[form].parts is None:
            return corrupt_bundle(complaint)
        return CorruptArtifactError(complaint, hint=SOURCE_AGAIN)

    def _find_damaged_record(self, name: str) -> None:
        for held in self.forms:
            out = torch.empty(held.record_size_bytes, dtype=torch.uint8)
            for record in held.table.records:
                if record.file == name:
                    self.read_record_into(record.layer, record.expert, out, form=held.index)


def _disk_error(where: str, error: OSError, remedy: str) -> StorageError:
    return StorageError(f"{where}: {error.strerror or error}", hint=remedy)


def _changed(where: str, what: str) -> CorruptArtifactError:
    return CorruptArtifactError(
        f"{where}: the file was changed after the bundle was opened",
        hint=f"run the command again, and leave {what} alone while it runs",
    )
