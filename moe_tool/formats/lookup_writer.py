"""Writer of the files of a lookup bundle, hashed as they are written."""

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from moe_tool.artifacts.bundle_manifest import BundleFile, SkeletonTensor
from moe_tool.errors import UsageError
from moe_tool.formats.atomic_write import storage_errors, sync_folder
from moe_tool.formats.bundle_files import is_taken, partial_folder, require_bundle_name


@contextmanager
def bundle_folder(out: Path) -> Iterator[Path]:
    """Yield a folder that takes the name `out` when the block ends without an exception.

    Otherwise it is removed.

    Raises:
        UsageError: `out`, or the folder of a bundle that is being written there, is in use.
        StorageError: the disk refuses.
    """
    require_bundle_name(out)
    part = partial_folder(out)
    for path in (out, part):
        if is_taken(path):
            raise UsageError(f"{path} is there already", hint="remove it, or choose another --out")
    with storage_errors(part):
        part.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            os.replace(part, out)
            sync_folder(out.absolute().parent)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> BundleFile:
    """Write a file piece by piece, durably; return its entry in the manifest.

    Raises:
        DiskFullError, StorageError: the disk refuses.
    """
    digest, size = hashlib.sha256(), 0
    with storage_errors(path), open(path, "xb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
            size += len(piece)
        file.flush()
        os.fsync(file.fileno())
    return BundleFile(name=path.name, size_bytes=size, sha256=digest.hexdigest())


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
