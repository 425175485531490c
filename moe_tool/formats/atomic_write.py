"""Atomic writing of files: temporary file, fsync, rename."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from moe_tool.budget.sizes import format_bytes
from moe_tool.errors import DiskFullError, StorageError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that takes the name `path` when the block ends without an exception.

    Otherwise the file is removed and `path` stays as it was. The file can also be read.

    Raises:
        DiskFullError: no space is left.
        StorageError: the file cannot be written.
    """
    temporary = path.parent / f".{path.name}.{os.getpid()}.part"
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with atomic_file(path) as file:
        file.write(data)


def require_free_disk(folder: Path, needed_bytes: int) -> None:
    """Refuse work whose result would not fit on the disk that holds `folder`.

    Args:
        folder: a folder; if it is missing, its nearest existing parent counts.

    Raises:
        DiskFullError: too little is free; the message has both numbers.
        StorageError: the free space is unknown.
    """
    with storage_errors(folder):
        existing = folder
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise DiskFullError(
            f"{folder} needs {format_bytes(needed_bytes)} of disk ({needed_bytes} bytes), "
            f"{format_bytes(free)} are free ({free} bytes)",
            hint="free some space or write to another disk",
        )


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's errors about `path` into named ones."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise DiskFullError(
                f"no space is left for {path}",
                hint="free some space and run the same command again",
            ) from error
        raise StorageError(
            f"{path}: {error.strerror or error}", hint="check the path, its permissions, the disk"
        ) from error
