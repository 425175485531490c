"""Writer of a lookup bundle: rows that are on the disk survive a kill, everything else is quick to
write again."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import xxhash
from pydantic import Field, ValidationError

from moe_tool.artifacts.bundle_manifest import BundleFile, SkeletonTensor
from moe_tool.artifacts.form_table import Xxh3
from moe_tool.artifacts.identity import ModelIdentity
from moe_tool.artifacts.lookup_manifest import LookupManifest
from moe_tool.artifacts.row_tables import HashedBlocks, block_bytes_of
from moe_tool.artifacts.schema import FrozenModel
from moe_tool.errors import UsageError
from moe_tool.formats.atomic_write import storage_errors, sync_folder
from moe_tool.formats.block_hashes import BlockHasher
from moe_tool.formats.bundle_files import (
    JOURNAL,
    MANIFEST,
    PART_SUFFIX,
    is_taken,
    partial_folder,
    require_bundle_name,
    safetensors_header,
)
from moe_tool.formats.bundle_journal import append_to_journal, read_journal, write_journal
from moe_tool.formats.bundle_spec import require_same_inputs
from moe_tool.formats.json_artifact import read_json_artifact, write_json_artifact
from moe_tool.formats.lookup_bundle import ROWS_FILE, ROWS_TENSOR

_SYNC_BYTES = 64 * 2**20
"""Bytes of rows after which they are made durable: what a kill loses at most"""
_READ_BYTES = 4 * 2**20


class WrittenRows(FrozenModel):
    """One line of the journal: the rows up to here are on the disk."""

    n_rows: Annotated[int, Field(ge=1, lt=2**31)]
    """Rows from the first one on"""
    xxh3: Xxh3
    """Hash of those that follow the line before"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LookupSpec:
    """The table of a lookup bundle, and what it is made from."""

    identity: ModelIdentity
    form: str
    n_rows: int
    row_bytes: int
    rows_at_once: int
    """Rows that are computed together: with others, sums could be rounded in another way"""

    @property
    def options(self) -> dict[str, str]:
        """Everything that has to be the same for a resume, by name"""
        return {
            "kind": "lookup-bundle",
            "bits": self.form,
            "shape": f"{self.n_rows} x {self.row_bytes}",
            "rows at once": str(self.rows_at_once),
        }

    def require_same(
        self, folder: Path, identity: ModelIdentity, options: Mapping[str, str]
    ) -> None:
        """Refuse a folder that was begun for another model or with other options; see
        `require_same_inputs`."""
        require_same_inputs(folder, identity, options, wanted=self)


class LookupWriter:
    """One lookup bundle while it is being written, in a folder that gets its name at the end."""

    def __init__(self, out: Path, spec: LookupSpec, beside: Iterable[str]) -> None:
        """Use `open`."""
        self._out, self._spec = out, spec
        self._own = {JOURNAL, MANIFEST, ROWS_FILE, *beside}
        self.folder = partial_folder(out)
        self._size_bytes = spec.n_rows * spec.row_bytes
        shape = (spec.n_rows, spec.row_bytes)
        self._header = safetensors_header([(ROWS_TENSOR, "U8", shape, self._size_bytes)])
        self._block_bytes = block_bytes_of(self._size_bytes)
        self._blocks = BlockHasher(self._block_bytes)
        self._digest = hashlib.sha256(self._header)
        self._file: int | None = None
        self._open_hash = xxhash.xxh3_64()
        self._n_durable = 0
        self.n_rows = 0
        """Rows written so far, by this run or by the one that it resumes"""
        self.files: list[BundleFile] = []
        """Entries of the files that are whole"""
        self.is_complete = False
        """Whether only the name is missing: the other run was killed right before"""

    @classmethod
    def open(cls, out: Path, spec: LookupSpec, *, beside: Iterable[str] = ()) -> "LookupWriter":
        """Begin a bundle in the folder `out`, or resume an interrupted one.

        Args:
            beside: names of files that may be added.

        Raises:
            UsageError: `out` is in use, holds a file of somebody else, or was begun with other
                options.
            WrongModelError: it was begun for another model.
            CorruptArtifactError: the journal is damaged.
            StorageError: the disk refuses.
        """
        require_bundle_name(out)
        if is_taken(out):
            raise UsageError(f"{out} is there already", hint="remove it, or choose another --out")
        writer = cls(out, spec, beside)
        with storage_errors(writer.folder):
            writer._begin_or_resume()
        return writer

    def append(self, rows: bytes) -> None:
        """Write the next rows; now and then all rows so far become durable.

        Raises:
            DiskFullError, StorageError: the disk refuses; durable rows can be resumed.
        """
        assert self._file is not None and len(rows) % self._spec.row_bytes == 0
        with storage_errors(self.folder / ROWS_FILE):
            _write_all(self._file, memoryview(rows))
            self._take(rows)
            self._open_hash.update(rows)
            self.n_rows += len(rows) // self._spec.row_bytes
            if (self.n_rows - self._n_durable) * self._spec.row_bytes >= _SYNC_BYTES:
                self._sync()

    def end_rows(self) -> HashedBlocks:
        """Make the whole table durable; return the hashes of its blocks."""
        assert self.n_rows == self._spec.n_rows
        self.suspend()
        size = len(self._header) + self._size_bytes
        entry = BundleFile(name=ROWS_FILE, size_bytes=size, sha256=self._digest.hexdigest())
        self.files.append(entry)
        return HashedBlocks(block_bytes=self._block_bytes, xxh3=self._blocks.result())

    def add_file(self, name: str, pieces: Iterable[bytes]) -> None:
        """Write another file piece by piece, durably.

        Raises:
            DiskFullError, StorageError: the disk refuses.
        """
        digest, size, path = hashlib.sha256(), 0, self.folder / name
        with storage_errors(path):
            path.unlink(missing_ok=True)  # torn by a kill
            with open(path, "xb") as file:
                for piece in pieces:
                    file.write(piece)
                    digest.update(piece)
                    size += len(piece)
                file.flush()
                os.fsync(file.fileno())
        self.files.append(BundleFile(name=name, size_bytes=size, sha256=digest.hexdigest()))

    def finish(self, manifest: LookupManifest, prove: Callable[[Path], float]) -> float:
        """Write the manifest, prove the bundle and give it its name; return what `prove` found.

        `prove` is given the folder with everything in it; its error keeps the bundle from its name.
        """
        with storage_errors(self.folder):
            write_json_artifact(self.folder / MANIFEST, manifest)
        found = prove(self.folder)
        with storage_errors(self.folder):
            (self.folder / JOURNAL).unlink(missing_ok=True)
            sync_folder(self.folder)
            os.rename(self.folder, self._out)
            sync_folder(self._out.absolute().parent)
        return found

    def read_manifest(self) -> LookupManifest:
        """Return the manifest of a complete bundle."""
        return read_json_artifact(self.folder / MANIFEST, LookupManifest)

    def suspend(self) -> None:
        """Make the rows so far durable and leave them for a resume."""
        with storage_errors(self.folder):
            if self._file is not None:
                self._sync()
                os.close(self._file)
                self._file = None

    def discard(self) -> None:
        """Remove what was written: it is of no use to anybody."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        with suppress(OSError):
            for name in self._own:
                (self.folder / name).unlink(missing_ok=True)
            self.folder.rmdir()

    def _begin_or_resume(self) -> None:
        folder = self.folder
        folder.mkdir(parents=True, exist_ok=True)
        for torn in folder.glob(f".*{PART_SUFFIX}"):  # unfinished atomic writes of a killed run
            torn.unlink()
        names = {path.name for path in folder.iterdir()}
        if {JOURNAL, MANIFEST} & names and names > self._own & names:
            foreign = folder / min(names - self._own)
            raise UsageError(
                f"{foreign} is no file of an interrupted bundle",
                hint=f"move it out of {folder}, which gets the bundle's name",
            )
        if JOURNAL in names:
            lines = read_journal(folder, self._spec)
        elif MANIFEST in names:
            found = self.read_manifest()
            table = LookupSpec(
                identity=found.identity,
                form=found.form,
                n_rows=found.vocabulary,
                row_bytes=found.row_bytes,
                rows_at_once=self._spec.rows_at_once,
            )
            self._spec.require_same(folder, table.identity, table.options)
            self.is_complete, self.n_rows = True, self._spec.n_rows
            return
        elif names:
            raise UsageError(
                f"{folder} exists and is not an interrupted bundle",
                hint=f"choose another --out, or remove {folder}",
            )
        else:
            lines = []
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        self._file = os.open(folder / ROWS_FILE, flags, 0o644)
        # Without a torn last line, nor lines of rows that are others by now.
        write_journal(folder, self._spec, self._adopt(lines))

    def _adopt(self, lines: Sequence[bytes]) -> list[WrittenRows]:
        """Take over the rows that match the journal, up to the first that do not, and cut the file
        there; return their lines."""
        assert self._file is not None
        kept: list[WrittenRows] = []
        if os.pread(self._file, len(self._header), 0) == self._header:
            for line in lines:
                try:
                    entry = WrittenRows.model_validate_json(line)
                except ValidationError:
                    break
                if not self.n_rows < entry.n_rows <= self._spec.n_rows or not self._matches(entry):
                    break
                for piece in self._pieces(entry.n_rows):
                    self._take(piece)
                self.n_rows = self._n_durable = entry.n_rows
                kept.append(entry)
        else:
            os.ftruncate(self._file, 0)
            _write_all(self._file, memoryview(self._header))
        end = len(self._header) + self.n_rows * self._spec.row_bytes
        os.ftruncate(self._file, end)
        os.lseek(self._file, end, os.SEEK_SET)
        return kept

    def _matches(self, entry: WrittenRows) -> bool:
        digest = xxhash.xxh3_64()
        for piece in self._pieces(entry.n_rows):
            digest.update(piece)
        return digest.hexdigest() == entry.xxh3

    def _pieces(self, n_rows: int) -> Iterator[bytes]:
        """Yield the bytes of the file from the rows so far up to `n_rows`, as far as there are."""
        assert self._file is not None
        at = len(self._header) + self.n_rows * self._spec.row_bytes
        end = len(self._header) + n_rows * self._spec.row_bytes
        while at < end:
            piece = os.pread(self._file, min(_READ_BYTES, end - at), at)
            if not piece:
                return
            yield piece
            at += len(piece)

    def _take(self, piece: bytes) -> None:
        self._digest.update(piece)
        for _ in self._blocks.passed([piece]):
            pass

    def _sync(self) -> None:
        """Sync the rows first, then the line that names them."""
        assert self._file is not None
        if self.n_rows == self._n_durable:
            return
        os.fsync(self._file)
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)
        entry = WrittenRows(n_rows=self.n_rows, xxh3=self._open_hash.hexdigest())
        append_to_journal(self.folder, [entry])
        self._n_durable, self._open_hash = self.n_rows, xxhash.xxh3_64()


class HashedTensor:
    """Pieces of one tensor that are hashed as they pass."""

    def __init__(self, name: str, pieces: Iterable[bytes]) -> None:
        self._name, self._pieces, self._digest = name, pieces, xxhash.xxh3_64()

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._pieces:
            self._digest.update(piece)
            yield piece

    def entry(self) -> SkeletonTensor:
        """Return the tensor's entry in the manifest, once all its pieces have passed."""
        return SkeletonTensor(name=self._name, xxh3=self._digest.hexdigest())


def _write_all(file: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += os.write(file, data[done:])
