"""Open record files of a bundle; records are read past the page cache where possible."""

import errno
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from moe_tool.artifacts.form_table import ALIGNMENT_BYTES
from moe_tool.formats.file_identity import FileIdentity, file_identity
from moe_tool.native.channels import read_runs

PIECE_BYTES = 4 * 2**20
"""Size of one read: 2 ms of a disk of 2 GB/s. A record of 26 MB takes one thread 4 % longer than in
one read, but a piece can be checked while another thread reads."""
OnPiece = Callable[[memoryview], bool]
"""Callback on every piece in order; returning False cancels the read."""
GAP_BYTES = 512
"""Largest gap between two wanted chunks that is read along with them. Another read of the page
cache takes 1.2 us, in which 20 KB could be copied, but bytes are scarce below the cache"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelRead:
    """Result of reading some channels."""

    channels: np.ndarray
    """[n] int64, ascending: the wanted channels and those in short gaps between them"""
    n_bytes: int


class RecordFiles:
    """Files held open by name; only reading is thread-safe."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        """Open the files; reads go through the page cache until `read_directly`.

        Raises:
            OSError: a file cannot be opened, or is a link.
        """
        self._folder = Path(os.path.abspath(folder))  # stays valid after a chdir
        self._handles: dict[str, int] = {}
        self._opened_as: dict[str, FileIdentity] = {}
        self.is_direct = False
        """Whether reads bypass the page cache"""
        try:
            for name in names:
                self._handles[name] = os.open(self._folder / name, os.O_RDONLY | os.O_NOFOLLOW)
                self._opened_as[name] = _identity(self._folder / name)
        except OSError:
            self.close()
            raise

    def read_directly(self) -> str | None:
        """Bypass the page cache from now on, if that works for every file.

        Bytes then go straight to their slot and are not held twice.

        Returns:
            The reason why not, which names the file system; None if it works.
        """
        if self.is_direct or not self._handles:
            return None
        direct: dict[str, int] = {}
        try:
            with mmap.mmap(-1, ALIGNMENT_BYTES) as block:
                for name in self._handles:
                    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECT
                    direct[name] = os.open(self._folder / name, flags)
                    # Some file systems accept the flag but refuse the read.
                    os.preadv(direct[name], [block], 0)
        except OSError as error:
            _close_all(direct)
            return (
                f"{_file_system(self._folder)} at {self._folder} refuses reads past the page "
                f"cache (O_DIRECT: {error.strerror or error})"
            )
        _close_all(self._handles)
        self._handles, self.is_direct = direct, True
        return None

    def read_into(
        self, name: str, offset: int, out: torch.Tensor, *, on_piece: OnPiece | None = None
    ) -> int | None:
        """Fill `out` from a file and return the bytes read, fewer at the file's end.

        Args:
            offset: multiple of ALIGNMENT_BYTES.
            out: uint8 [n], n a multiple of ALIGNMENT_BYTES; overwritten. Unaligned memory costs a
                copy.
            on_piece: called on each piece of at most PIECE_BYTES, but not on a piece that the
                file's end cuts short; None: everything in one read.

        Returns:
            None if `on_piece` cancelled the read; `out` then holds anything.

        Raises:
            OSError: the read fails.
        """
        if self.is_direct and out.data_ptr() % ALIGNMENT_BYTES:
            # Anonymous mappings are page-aligned.
            aligned = torch.frombuffer(mmap.mmap(-1, out.numel()), dtype=torch.uint8)
            count = self._read(name, offset, aligned.numpy().data, on_piece)
            out.copy_(aligned)
            return count
        return self._read(name, offset, out.numpy().data, on_piece)

    def _read(
        self, name: str, offset: int, view: memoryview, on_piece: OnPiece | None
    ) -> int | None:
        done = 0
        piece_bytes = len(view) if on_piece is None else PIECE_BYTES
        while done < len(view):
            piece = view[done : done + piece_bytes]
            count = os.preadv(self._handles[name], [piece], offset + done)
            # A direct read continues at whole blocks only; a partial block is the file's end.
            step = count // ALIGNMENT_BYTES * ALIGNMENT_BYTES if self.is_direct else count
            if step == 0:
                return done + count
            done += step
            if on_piece is not None and not on_piece(piece[:step]):
                return None
        return done

    def expect(self, name: str, offset: int, n_bytes: int) -> None:
        """Advise the system that a part of a file will be read."""
        os.posix_fadvise(self._handles[name], offset, n_bytes, os.POSIX_FADV_WILLNEED)

    def read_chunks(
        self, name: str, offset: int, out: torch.Tensor, chunks: np.ndarray
    ) -> ChannelRead:
        """Fill some rows of `out` with the rows of a table in a file, run by run.

        Args:
            offset: file offset of the table.
            out: uint8 [n, bytes per row], contiguous.
            chunks: row numbers, ascending.

        Raises:
            OSError: the read fails, or the file is too short.
        """
        assert not self.is_direct, "a direct read takes whole blocks"
        row_bytes = out.shape[1]
        starts, stops = chunk_runs(chunks, row_bytes)
        runs = np.stack([starts, stops - starts], axis=1) * row_bytes  # [runs, (offset, bytes)]
        n_read = read_runs(self._handles[name], offset, runs, out)
        if n_read < int(runs[:, 1].sum()):
            raise OSError(errno.EIO, "the file ended before the record does")
        steps = np.ones(int((stops - starts).sum()), dtype=np.int64)
        if len(starts):
            steps[0] = starts[0]
            steps[np.cumsum(stops - starts)[:-1]] = starts[1:] - stops[:-1] + 1
        return ChannelRead(channels=np.cumsum(steps), n_bytes=n_read)

    def has_changed(self, name: str) -> bool:
        """Return whether a file was replaced or changed since it was opened.

        Raises:
            OSError: the file's status cannot be read.
        """
        try:
            return _identity(self._folder / name) != self._opened_as[name]
        except FileNotFoundError:
            return True

    def close(self) -> None:
        """Close the files."""
        handles, self._handles = self._handles, {}
        _close_all(handles)


def chunk_runs(chunks: np.ndarray, chunk_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return begin and end of runs of chunks with gaps of at most GAP_BYTES, [runs] int64 each.

    Args:
        chunks: [n] chunk numbers, ascending.
        chunk_bytes: size of a chunk.
    """
    chunks = chunks.astype(np.int64)
    if not len(chunks):
        return chunks, chunks
    breaks = np.flatnonzero((np.diff(chunks) - 1) * chunk_bytes > GAP_BYTES)
    starts = chunks[np.concatenate([[0], breaks + 1])]
    stops = chunks[np.concatenate([breaks, [len(chunks) - 1]])] + 1
    return starts, stops


def _identity(path: Path) -> FileIdentity:
    return file_identity(os.stat(path, follow_symlinks=False))


def _close_all(handles: dict[str, int]) -> None:
    for handle in handles.values():
        os.close(handle)


def _file_system(folder: Path) -> str:
    """Return the type of a folder's file system, e.g. "overlay"."""
    try:
        device = os.stat(folder).st_dev
        wanted = f"{os.major(device)}:{os.minor(device)}"
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
            fields = line.split()
            if fields[2] == wanted:
                return fields[fields.index("-") + 1]
    except (OSError, ValueError, IndexError):
        pass  # the type stays unnamed
    return "the file system"
