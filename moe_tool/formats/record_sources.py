"""Files of a checkpoint that hold a bundle's records; records are put together from their ranges.

A range begins anywhere, not at a block of the disk: reads go through the page cache, and the pages
are dropped afterwards.
"""

import errno
import hashlib
import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from moe_tool.artifacts.form_table import ALIGNMENT_BYTES
from moe_tool.artifacts.source_files import WIDENED, Part, SourceFile, SourceFiles
from moe_tool.errors import CorruptArtifactError, NotFoundError
from moe_tool.formats.file_identity import file_identity
from moe_tool.formats.home_folder import from_home
from moe_tool.formats.hostile_file import open_plain_file, quoted, reading
from moe_tool.formats.record_files import PIECE_BYTES, OnPiece
from moe_tool.formats.record_layout import RecordLayout, Segment

SOURCE_AGAIN = "put the checkpoint back as it was, or pack the bundle again in another folder"
"""Hint for a checkpoint that is not what it was"""


class RecordSources:
    """Open files of a checkpoint; only reading is thread-safe."""

    def __init__(self, folder: Path, files: Sequence[SourceFile]) -> None:
        """Open the files and check their sizes and headers.

        Raises:
            NotFoundError: a file is not there.
            CorruptArtifactError: a file is another one than when the bundle was packed, or lies
                outside the folder.
            StorageError: it cannot be read.
        """
        self.folder = folder
        self.files = tuple(files)
        self.paths: list[Path] = []
        """Files by their position, links resolved"""
        self._handles: list[int] = []
        self._opened_as: list[tuple[int, int, int]] = []
        try:
            for file in files:
                self._open(file)
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, sources: SourceFiles) -> "RecordSources":
        """Open the files that a manifest names; see `RecordSources`."""
        folder = Path(sources.resolved)
        if not folder.is_dir():
            other = from_home(sources.folder)
            if not other.is_dir():
                raise _moved(folder)
            folder = other
        return cls(folder, sources.files)

    def read_into(
        self,
        parts: Sequence[Part],
        layout: RecordLayout,
        out: torch.Tensor,
        *,
        on_piece: OnPiece | None = None,
    ) -> int | None:
        """Fill a record from its parts and return its size.

        Args:
            out: uint8 [layout.size_bytes], overwritten, zeros between segments.
            on_piece: called on each piece in order, at most PIECE_BYTES unless it is a part that is
                repeated or widened.

        Returns:
            None if `on_piece` cancelled the read; `out` then holds anything.

        Raises:
            OSError: the read fails, or a file is too short.
        """
        view = out.numpy().data
        for part in parts:
            handle = self._handles[part.file]
            os.posix_fadvise(handle, part.offset, part.size_bytes, os.POSIX_FADV_WILLNEED)
        for piece in self._pieces(parts, layout, view):
            if on_piece is not None and not on_piece(piece):
                return None
        return layout.size_bytes

    def read_segment(self, parts: Sequence[Part], segment: Segment) -> torch.Tensor:
        """Return the bytes that fill a segment, uint8 [n_bytes].

        Raises:
            OSError: as `read_into`.
        """
        out, at = torch.empty(segment.n_bytes, dtype=torch.uint8), 0
        for part in parts:
            for _ in self._read(part, out.numpy().data[at : at + part.filled_bytes]):
                pass
            at += part.filled_bytes
        return out

    def changed_file(self, parts: Sequence[Part]) -> Path | None:
        """Return a file of these parts that was replaced or changed since it was opened, if any.

        Raises:
            OSError: the file's status cannot be read.
        """
        for at in sorted({part.file for part in parts}):
            try:
                if file_identity(os.stat(self.paths[at])) != self._opened_as[at]:
                    return self.paths[at]
            except FileNotFoundError:
                return self.paths[at]
        return None

    def close(self) -> None:
        """Close the files."""
        handles, self._handles = self._handles, []
        for handle in handles:
            os.close(handle)

    def _open(self, file: SourceFile) -> None:
        path = source_path(self.folder, file.name)
        with reading(path), open_plain_file(path, remedy=SOURCE_AGAIN) as opened:
            size = os.fstat(opened.fileno()).st_size
            header = opened.read(file.header_bytes) if size == file.size_bytes else b""
            if hashlib.sha256(header).hexdigest() != file.header_sha256:
                found = f"{size} bytes" if size != file.size_bytes else "another header"
                raise CorruptArtifactError(
                    f"{path} is not the file that the bundle was packed from: wanted "
                    f"{file.size_bytes} bytes with the same tensors, found {found}",
                    hint=SOURCE_AGAIN,
                )
            self._handles.append(os.dup(opened.fileno()))
            self._opened_as.append(file_identity(os.fstat(opened.fileno())))
        self.paths.append(path)

    def _pieces(
        self, parts: Sequence[Part], layout: RecordLayout, view: memoryview
    ) -> Iterator[memoryview]:
        todo = iter(parts)
        for segment in layout.segments:
            at, end = segment.offset, segment.offset + segment.n_bytes
            while at < end:
                part = next(todo)
                yield from self._read(part, view[at : at + part.filled_bytes])
                at += part.filled_bytes
            padding = view[end : segment.offset + segment.size_bytes]
            padding[:] = bytes(len(padding))
            yield padding

    def _read(self, part: Part, view: memoryview) -> Iterator[memoryview]:
        if part.times != 1:
            raw = bytearray(part.size_bytes)
            self._fill(part, memoryview(raw), 0)
            view[:] = _spread(raw, part.times)
            yield view
            return
        for done in range(0, len(view), PIECE_BYTES):
            piece = view[done : done + PIECE_BYTES]
            self._fill(part, piece, done)
            yield piece

    def _fill(self, part: Part, view: memoryview, start: int) -> None:
        handle, offset, done = self._handles[part.file], part.offset + start, 0
        while done < len(view):
            count = os.preadv(handle, [view[done:]], offset + done)
            if count == 0:
                raise OSError(errno.EIO, f"{self.paths[part.file]} ended before the record does")
            done += count
        # Under a memory limit the page cache counts too; only whole pages can be dropped.
        first = offset // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        rest = offset + len(view) - first
        n_bytes = -(-rest // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        os.posix_fadvise(handle, first, n_bytes, os.POSIX_FADV_DONTNEED)


def source_path(folder: Path, name: str) -> Path:
    """Return a file of a checkpoint, links resolved: it may link into the folder, or into the blobs
    of its repository in a Hugging Face cache.

    Raises:
        NotFoundError: there is no such file.
        CorruptArtifactError: it lies elsewhere.
        StorageError: it cannot be looked up.
    """
    with reading(folder / name):
        try:
            home = folder.resolve()
            path = (home / name).resolve(strict=True)
        except (FileNotFoundError, RuntimeError) as error:  # RuntimeError: a loop of links
            raise NotFoundError(
                f"{folder / name}, which holds experts of this bundle, is not there",
                hint=f"download the checkpoint again, or {SOURCE_AGAIN}",
            ) from error
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")
    if path.parent not in homes:
        raise CorruptArtifactError(
            f"{folder / name} is a link to a file elsewhere, {path}",
            hint="copy the file into the folder, or pack without --in-place",
        )
    return path


def _moved(folder: Path) -> NotFoundError:
    place = shlex.quote(str(folder))
    if os.path.lexists(folder):
        reason, first = "no folder any more", f"mv {place} {place}.old && "
    else:
        reason, first = "not there", ""
    if not folder.parent.is_dir():
        first = f"mkdir -p {shlex.quote(str(folder.parent))} && "
    return NotFoundError(
        f"the experts of this bundle lie in the checkpoint {quoted(folder)}, which is {reason}",
        hint=f"move it back, or say where it is now: {first}ln -s NEW_FOLDER {place}",
    )


def require_filled(parts: Sequence[Part], layout: RecordLayout) -> None:
    """Refuse parts that do not fill the segments of a record one after the other.

    Raises:
        ValueError: names the segment.
    """
    todo = iter(parts)
    for segment in layout.segments:
        left = segment.n_bytes
        while left > 0:
            part = next(todo, None)
            left -= 0 if part is None else part.filled_bytes
            if part is None or left < 0:
                raise ValueError(f"parts do not fill {segment.name}")
    if next(todo, None) is not None:
        raise ValueError("a record has more parts than it holds")


def _spread(raw: bytearray, times: int) -> bytes:
    if times == WIDENED:
        return (np.frombuffer(raw, dtype="<u2").astype("<u4") << 16).tobytes()
    return bytes(raw) * times
