"""Rows of an embedding table that stays in its files, read as tokens need them."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from moe_tool.errors import CorruptArtifactError, StorageError
from moe_tool.formats.block_hashes import CheckedBlocks
from moe_tool.formats.bundle_checks import REPACK
from moe_tool.formats.file_identity import FileIdentity, file_identity
from moe_tool.formats.hostile_file import quoted
from moe_tool.formats.safetensors_index import AGAIN, DTYPES, TensorInfo
from moe_tool.formats.tensor_stream import fill, require_finite, stream_hashed

Pace = Callable[[int], AbstractContextManager[None]]
"""Returns what a read of so many bytes happens in; it may make the read take longer"""


class TableRows:
    """One table [V, d] of floats or bytes, in one tensor or in several below each other."""

    def __init__(
        self, parts: Sequence[TensorInfo], blocks: Mapping[str, CheckedBlocks] | None = None
    ) -> None:
        """Use `open` or `open_unhashed`.

        Args:
            parts: tensors [v, d] of one float dtype, whose rows follow each other.
            blocks: hashed blocks by tensor, of those that have any; None: of a checkpoint, which
                has no hashes, but must hold finite numbers.
        """
        self._parts = tuple(parts)
        self._blocks: Mapping[str, CheckedBlocks] = blocks or {}
        self._is_hashed = blocks is not None
        self._files: dict[Path, int] = {}
        self._opened_as: dict[Path, FileIdentity | None] = {}
        self._block = memoryview(
            bytearray(max((each.block_bytes for each in self._blocks.values()), default=0))
        )
        self.n_rows = sum(part.shape[0] for part in parts)
        self.width = parts[0].shape[1]
        self.bytes_read = 0
        """Bytes of rows read, without what is read along to check them"""
        self.bytes_beside = 0
        """Bytes read along: the rest of each block, when its first row is read"""
        self.pace: Pace = full_speed

    @classmethod
    def open(
        cls,
        parts: Sequence[TensorInfo],
        hashes: Mapping[str, str],
        blocks: Mapping[str, CheckedBlocks],
    ) -> "TableRows":
        """Open a table of a bundle.

        A tensor with hashed blocks is not read yet: each block is checked when the first row in it
        is read. Any other one is read through once, to check it as a whole.

        Args:
            parts: tensors [v, d] of one dtype, whose rows follow each other.
            hashes: tensor name -> xxh3-64 of its bytes.
            blocks: tensor name -> its hashed blocks.

        Raises:
            CorruptArtifactError: a tensor is not the one that was packed.
            StorageError: the disk does not give it.
        """
        rows = cls(parts, {part.name: blocks[part.name] for part in parts if part.name in blocks})
        try:
            for part in parts:
                rows._open(part)  # before the check, so that a change after it is noticed
                if part.name not in blocks:
                    for _ in stream_hashed(part, hashes[part.name]):
                        pass
        except BaseException:
            rows.close()
            raise
        return rows

    @classmethod
    def open_unhashed(cls, parts: Sequence[TensorInfo]) -> "TableRows":
        """Open a table of a checkpoint; its rows have to be finite, and files open at a read."""
        return cls(parts)

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Return rows as float32, [n, d]; adjacent ones come in one read.

        Args:
            ids: [n] int64 row numbers, ascending and unique.

        Raises:
            CorruptArtifactError: a file was changed since it was checked.
            StorageError: the disk does not give the rows.
        """
        return self._read_rows(torch.empty(len(ids), self.width, dtype=torch.float32), ids)

    def read_bytes(self, ids: torch.Tensor) -> torch.Tensor:
        """Return rows of a table of bytes, [n, width] uint8; otherwise as `read`."""
        assert all(part.dtype == "U8" for part in self._parts)
        return self._read_rows(torch.empty(len(ids), self.width, dtype=torch.uint8), ids)

    def _read_rows(self, out: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Return `out` after reading the rows into it, in its dtype."""
        at = 0
        for part, first, count in self._runs(ids.tolist()):
            raw = torch.empty(count, self.width, dtype=DTYPES[part.dtype])
            view = raw.view(torch.uint8).numpy().data.cast("B")
            self._read_into(part, first * (part.size_bytes // part.shape[0]), view)
            self.bytes_read += len(view)
            out[at : at + count] = raw
            at += count
        for path in self._files:
            if _identity(path) != self._opened_as[path]:
                raise CorruptArtifactError(
                    f"{path} was changed after it was opened",
                    hint="run the command again, and leave the file alone while it runs",
                )
        return out

    def verify(self) -> None:
        """Read every block of the tensors with hashed blocks, and compare it with its hash.

        Raises:
            CorruptArtifactError: names the tensor and the bytes that differ.
            StorageError: the disk does not give them.
        """
        for part in self._parts:
            blocks = self._blocks.get(part.name)
            for number in range(0 if blocks is None else blocks.n_blocks):
                assert blocks is not None
                first, stop = blocks.span(number)
                block = self._block[: stop - first]
                self._fill(part, block, first)
                blocks.require(number, block)

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

    def _read_into(self, part: TensorInfo, begin: int, view: memoryview) -> None:
        """Read bytes of a tensor from `begin` on, each block whole where it is not known yet."""
        blocks = self._blocks.get(part.name)
        if blocks is None:
            self._fill(part, view, begin)
            if not self._is_hashed:
                require_finite(part, view)
            return
        at, end = begin, begin + len(view)
        last = (end - 1) // blocks.block_bytes
        while at < end:
            number = at // blocks.block_bytes
            n_known = blocks.n_known(number, last)
            if n_known:
                stop = min(end, (number + n_known) * blocks.block_bytes)
                self._fill(part, view[at - begin : stop - begin], at)
            else:
                first, stop = blocks.span(number)
                block = self._block[: stop - first]
                self._fill(part, block, first)
                blocks.require(number, block)
                stop = min(end, stop)
                view[at - begin : stop - begin] = block[at - first : stop - first]
                self.bytes_beside += len(block) - (stop - at)
            at = stop

    def _fill(self, part: TensorInfo, view: memoryview, begin: int) -> None:
        remedy = REPACK if self._is_hashed else AGAIN
        file = self._open(part)
        with self.pace(len(view)):
            fill(file, part, view, part.offset + begin, remedy=remedy)

    def _open(self, part: TensorInfo) -> int:
        """Return the open file of a tensor."""
        path = part.file
        if path not in self._files:
            # A bundle's files are its own; a checkpoint in the hub's cache consists of links.
            flags = os.O_RDONLY | (os.O_NOFOLLOW if self._is_hashed else 0)
            try:
                self._files[path] = os.open(path, flags)
            except OSError as error:
                raise StorageError(
                    f"{path}: {error.strerror or error} while {quoted(part.name)} was read",
                    hint="check the disk",
                ) from error
            # Otherwise the system reads 128 KiB around each row.
            os.posix_fadvise(self._files[path], 0, 0, os.POSIX_FADV_RANDOM)
            self._opened_as[path] = _identity(path)
        return self._files[path]


def full_speed(n_bytes: int) -> AbstractContextManager[None]:
    """Let a read take the time that it takes."""
    del n_bytes
    return nullcontext()


def _identity(path: Path) -> FileIdentity | None:
    """Return the present identity of a file; None if it is gone."""
    try:
        return file_identity(os.stat(path, follow_symlinks=False))
    except OSError:
        return None
