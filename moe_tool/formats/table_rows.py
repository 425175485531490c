"""Rows of an embedding table that stays in its files, read as tokens need them."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import xxhash

from moe_tool.errors import CorruptArtifactError, StorageError
from moe_tool.formats.bundle_checks import corrupt_bundle
from moe_tool.formats.file_identity import FileIdentity, file_identity
from moe_tool.formats.hostile_file import quoted
from moe_tool.formats.safetensors_index import DTYPES, TensorInfo

_BLOCK_BYTES = 4 * 2**20


class TableRows:
    """One table [V, d] of floats or bytes, in one tensor or in several below each other."""

    def __init__(self, parts: Sequence[TensorInfo]) -> None:
        """Use `open`."""
        self._parts = tuple(parts)
        self._files: dict[Path, int] = {}
        self._opened_as: dict[Path, FileIdentity | None] = {}
        self.n_rows = sum(part.shape[0] for part in parts)
        self.width = parts[0].shape[1]
        self.bytes_read = 0
        """Bytes of rows read, without the check when the table was opened"""

    @classmethod
    def open(cls, parts: Sequence[TensorInfo], hashes: Mapping[str, str]) -> "TableRows":
        """Open a table after reading it once, block by block, to check it.

        Args:
            parts: tensors [v, d] of one dtype, whose rows follow each other.
            hashes: tensor name -> xxh3-64 of its bytes.

        Raises:
            CorruptArtifactError: a tensor is not the one that was packed.
            StorageError: the disk does not give it.
        """
        rows = cls(parts)
        try:
            for part in parts:
                rows._check(part, hashes[part.name])
            for handle in rows._files.values():  # or the system reads 128 KiB around each row
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
        except BaseException:
            rows.close()
            raise
        return rows

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Return rows as float32, [n, d]; adjacent ones come in one read.

        Args:
            ids: [n] int64 row numbers, ascending and unique.

        Raises:
            CorruptArtifactError: a file was changed since it was checked.
            StorageError: the disk does not give the rows.
        """
        return self._read_into(torch.empty(len(ids), self.width, dtype=torch.float32), ids)

    def read_bytes(self, ids: torch.Tensor) -> torch.Tensor:
        """Return rows of a table of bytes, [n, width] uint8; otherwise as `read`."""
        assert all(part.dtype == "U8" for part in self._parts)
        return self._read_into(torch.empty(len(ids), self.width, dtype=torch.uint8), ids)

    def _read_into(self, out: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Return `out` after reading the rows into it, in its dtype."""
        at = 0
        for part, first, count in self._runs(ids.tolist()):
            raw = torch.empty(count, self.width, dtype=DTYPES[part.dtype])
            view = raw.view(torch.uint8).numpy().data.cast("B")
            self._fill(part, view, part.offset + first * (part.size_bytes // part.shape[0]))
            self.bytes_read += len(view)
            out[at : at + count] = raw
            at += count
        for path in self._files:
            if _identity(path) != self._opened_as[path]:
                raise CorruptArtifactError(
                    f"{path} was changed after the bundle was opened",
                    hint="run the command again, and leave the bundle alone while it runs",
                )
        return out

    def close(self) -> None:
        """Close the files."""
        files, self._files = self._files, {}
        for handle in files.values():
            os.close(handle)

    def _runs(self, ids: list[int]) -> Iterator[tuple[TensorInfo, int, int]]:
        """Yield runs of adjacent rows as (part, first row in the part, number of rows)."""
        at, begin = 0, 0
        for part in self._parts:
            end = begin + part.shape[0]
            while at < len(ids) and ids[at] < end:
                first = at
                at += 1
                while at < len(ids) and ids[at] == ids[at - 1] + 1 and ids[at] < end:
                    at += 1
                yield part, ids[first] - begin, at - first
            begin = end

    def _check(self, part: TensorInfo, xxh3: str) -> None:
        block = memoryview(bytearray(min(_BLOCK_BYTES, part.size_bytes)))
        digest = xxhash.xxh3_64()
        for done in range(0, part.size_bytes, _BLOCK_BYTES):
            view = block[: min(_BLOCK_BYTES, part.size_bytes - done)]
            self._fill(part, view, part.offset + done)
            digest.update(view)
            # Under a memory limit the page cache counts too.
            os.posix_fadvise(
                self._files[part.file], part.offset + done, len(view), os.POSIX_FADV_DONTNEED
            )
        if digest.hexdigest() != xxh3:
            raise corrupt_bundle(
                f"{part.file} is damaged: the hash of {quoted(part.name)} does not fit"
            )

    def _fill(self, part: TensorInfo, view: memoryview, offset: int) -> None:
        done = 0
        try:
            if part.file not in self._files:
                self._files[part.file] = os.open(part.file, os.O_RDONLY | os.O_NOFOLLOW)
                self._opened_as[part.file] = _identity(part.file)
            while done < len(view):
                count = os.preadv(self._files[part.file], [view[done:]], offset + done)
                if count == 0:
                    raise corrupt_bundle(f"{part.file} ended while {quoted(part.name)} was read")
                done += count
        except OSError as error:
            raise StorageError(
                f"{part.file}: {error.strerror or error} while {quoted(part.name)} was read",
                hint="check the disk",
            ) from error


def _identity(path: Path) -> FileIdentity | None:
    """Return the present identity of a file; None if it is gone."""
    try:
        return file_identity(os.stat(path, follow_symlinks=False))
    except OSError:
        return None
