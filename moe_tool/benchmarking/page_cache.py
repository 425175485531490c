"""Eviction of files from the kernel's page cache."""

import os
from collections.abc import Iterable
from pathlib import Path

from moe_tool.errors import StorageError


def drop_page_cache(files: Iterable[Path]) -> None:
    """Write back and drop the cached pages of files, so that the next read goes to the disk.

    Pages mapped by a process stay.

    Raises:
        StorageError: a file cannot be opened.
    """
    for path in files:
        try:
            handle = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror}") from error
        try:
            os.fsync(handle)  # a page that waits to be written cannot be dropped
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
