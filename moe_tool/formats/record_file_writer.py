"""Writer of one record file, which can resume an interrupted one."""

import hashlib
import os
from pathlib import Path

import xxhash

from moe_tool.errors import StorageError
from moe_tool.formats.bundle_files import ExpertFile
from moe_tool.formats.bundle_journal import WrittenRecord


class RecordFileWriter:
    """Open record file to append to, with a running sha256 of its content."""

    def __init__(self, folder: Path, file: ExpertFile, *, anew: bool) -> None:
        """Open the file with its header in place.

        Args:
            anew: discard old content; else its records wait for `take_over`.
        """
        self._file = file
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | (os.O_TRUNC if anew else 0)
        self._handle = os.open(folder / file.name, flags, 0o644)
        if _read_all(self._handle, len(file.header), 0) != file.header:
            os.ftruncate(self._handle, 0)
            _write_all(self._handle, memoryview(file.header))
        self._digest = hashlib.sha256(file.header)

    def append(self, data: memoryview) -> None:
        """Write the next record."""
        _write_all(self._handle, data)
        self._digest.update(data)

    def take_over(self, position: int, record: WrittenRecord) -> bool:
        """Accept a record that the file already holds; return False if its hash does not match."""
        data = _read_all(self._handle, self._file.record_size_bytes, self._file.offset(position))
        if xxhash.xxh3_64_hexdigest(data) != record.xxh3:
            return False
        self._digest.update(data)
        return True

    def cut(self, n_records: int) -> None:
        """Truncate the file to so many records and continue after them."""
        os.ftruncate(self._handle, self._file.offset(n_records))
        os.lseek(self._handle, 0, os.SEEK_END)

    def sync(self) -> None:
        """Flush to disk and drop the file from the page cache."""
        os.fsync(self._handle)
        os.posix_fadvise(self._handle, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> str:
        """Close the file and return the sha256 of its header and records."""
        os.close(self._handle)
        return self._digest.hexdigest()


def _write_all(file: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        written = os.write(file, data[done:])
        if written <= 0:
            raise StorageError("the disk takes no more bytes")
        done += written


def _read_all(file: int, size: int, offset: int) -> bytes:
    """Return up to `size` bytes, fewer only at the file's end."""
    data = bytearray()
    while len(data) < size:
        block = os.pread(file, size - len(data), offset + len(data))
        if not block:
            break
        data += block
    return bytes(data)
