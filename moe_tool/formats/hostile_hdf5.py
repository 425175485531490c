"""HDF5 files with a hash at their end, so that damage is refused before the HDF5 library sees it.

The library reads out of bounds in damaged files. The last SEAL_BYTES, behind the HDF5 data, are
the sha256 of everything before them. Only datasets stored plainly in the file are opened: no
links, no filters, no external or sparse storage.
"""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import h5py
import numpy as np
from pydantic import ValidationError

from moe_tool.artifacts.schema import FrozenModel
from moe_tool.errors import ArtifactVersionError, CorruptArtifactError, MoeToolError
from moe_tool.formats.atomic_write import atomic_file
from moe_tool.formats.hostile_file import one_line, open_plain_file, quoted, reading
from moe_tool.formats.strict_json import first_complaint, parse_json_object

SEAL_BYTES = 32
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_BLOCK_BYTES = 2**20
_VERSION = 1
"""Format version of every kind of file"""

Header = TypeVar("Header", bound=FrozenModel)


@contextmanager
def created_hdf5(path: Path) -> Iterator[h5py.File]:
    """Yield a new HDF5 file that appears sealed at `path` when the block ends without an error.

    Raises:
        DiskFullError, StorageError: the file cannot be written.
    """
    with atomic_file(path) as raw:
        guarded = _Guarded(raw)
        try:
            # Through a Python file object HDF5 leaves no lock and stores no file name.
            with h5py.File(guarded, "w", libver=("v110", "v110"), track_order=False) as file:
                yield file
        finally:
            if guarded.error is not None:  # h5py's error hides the cause
                raise guarded.error
        raw.seek(0)
        digest = hashlib.sha256()
        while block := raw.read(_BLOCK_BYTES):
            digest.update(block)
        raw.write(digest.digest())


def verified_sha256(path: Path, *, remedy: str) -> str:
    """Return the sha256 of a whole HDF5 file after comparing it with its seal.

    Raises:
        NotFoundError: there is no such file.
        CorruptArtifactError: it is no HDF5 file, truncated or damaged.
        StorageError: it cannot be read.
    """
    digest = hashlib.sha256()
    with reading(path), open_plain_file(path, remedy=remedy) as file:
        held_back = file.read(len(_SIGNATURE))
        if held_back != _SIGNATURE:
            raise CorruptArtifactError(f"{path} is not an HDF5 file, so not a profile", hint=remedy)
        while block := file.read(_BLOCK_BYTES):
            held_back += block
            digest.update(held_back[:-SEAL_BYTES])
            held_back = held_back[-SEAL_BYTES:]
    if digest.digest() != held_back:
        raise damaged(path, "its content does not fit the hash at its end", remedy=remedy)
    digest.update(held_back)
    return digest.hexdigest()


@contextmanager
def opened_hdf5(path: Path, *, remedy: str) -> Iterator[h5py.File]:
    """Yield a sealed file for reading; errors of the block pass through unchanged."""
    with translated(path, remedy=remedy):
        file = h5py.File(path, "r", locking=False)
    try:
        yield file
    finally:
        file.close()


@contextmanager
def translated(path: Path, *, remedy: str) -> Iterator[None]:
    """Turn the many errors of h5py into a CorruptArtifactError."""
    try:
        yield
    except MoeToolError:
        raise
    except (
        *(OSError, ValueError, TypeError, AttributeError, RuntimeError),
        *(LookupError, ArithmeticError, MemoryError, SystemError),
    ) as error:
        reason = one_line(error) or type(error).__name__
        raise damaged(path, f"HDF5 says {reason}", remedy=remedy) from error


def damaged(path: Path, reason: str, *, remedy: str) -> CorruptArtifactError:
    """Return the error for a damaged file."""
    return CorruptArtifactError(f"{path} is damaged: {reason}", hint=remedy)


def write_header(file: h5py.File, kind: str, header: FrozenModel) -> None:
    """Write kind, version and a header of JSON to the root attributes."""
    file.attrs["kind"] = kind
    file.attrs["format_version"] = _VERSION
    file.attrs["header"] = header.model_dump_json()


def read_header(
    file: h5py.File, path: Path, kind: str, schema: type[Header], *, label: str, remedy: str
) -> Header:
    """Return the header that `write_header` wrote.

    Raises:
        CorruptArtifactError: the file is of another kind (it is not `label`), or damaged.
        ArtifactVersionError: it has another version.
    """
    if file.attrs.get("kind") != kind:
        raise CorruptArtifactError(f"{path} is not {label}", hint=remedy)
    version = file.attrs.get("format_version")
    if not isinstance(version, np.integer) or version != _VERSION:
        raise ArtifactVersionError(
            f"{path} has format version {quoted(version)}, wanted {_VERSION}", hint=remedy
        )
    text = file.attrs.get("header")
    if not isinstance(text, str):
        raise damaged(path, "it has no header", remedy=remedy)
    parse_json_object(path, text.encode(), remedy=remedy)  # stricter than pydantic
    try:
        return schema.model_validate_json(text)
    except ValidationError as error:
        raise damaged(path, f"header: {first_complaint(error)}", remedy=remedy) from error


def child_group(parent: h5py.Group, name: str, path: Path) -> h5py.Group:
    """Return the group of a slash-separated name, following hard links only."""
    found = _child(parent, name, path)
    if not isinstance(found, h5py.Group):
        raise _missing(name, path)
    return found


def child_dataset(parent: h5py.Group, name: str, path: Path) -> h5py.Dataset:
    """Return a dataset stored plainly in this file: its storage size must equal its bytes."""
    found = _child(parent, name, path)
    if not isinstance(found, h5py.Dataset) or found.shape is None:
        raise _missing(name, path)
    n_bytes = math.prod(map(int, found.shape)) * found.dtype.itemsize
    odd = found.external or found.is_virtual or found.chunks or found.dtype.kind == "O"
    if odd or found.id.get_storage_size() != n_bytes:
        raise CorruptArtifactError(
            f"{path} is damaged: {name} is not stored plainly in the file", hint="record it again"
        )
    return found


def _child(parent: h5py.Group, name: str, path: Path) -> Any:
    found = parent
    for step in name.split("/"):
        if not isinstance(found, h5py.Group):
            raise _missing(name, path)
        links = found.id.links  # h5py's own lookup would follow the link
        if not links.exists(step.encode()):
            raise _missing(name, path)
        if links.get_info(step.encode()).type != h5py.h5l.TYPE_HARD:
            raise CorruptArtifactError(
                f"{path} is damaged: {name} is a link", hint="record it again"
            )
        found = found[step]
    return found


def _missing(name: str, path: Path) -> CorruptArtifactError:
    return CorruptArtifactError(
        f"{path} is damaged: {name} is missing", hint="record it again with moe-tool profile"
    )


class _Guarded:
    """File that remembers its first write error."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)

    def write(self, data: bytes) -> int:
        try:
            return self._raw.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
