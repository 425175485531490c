"""Hidden states of all tokens at a layer boundary, in memory or in a file, with a copy on disk that
a resume starts from.

Two files alternate, so that one complete boundary exists at any moment. They are not fsynced:
writes survive a killed process, and damage by a power cut is found by the hash and recomputed.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import xxhash

from moe_tool.formats.atomic_write import atomic_write_bytes

_COPY_BYTES = 16 * 2**20


class HiddenStates:
    """[rows, H] float32 hidden states, one row per token, read and written in blocks of rows."""

    def __init__(self, folder: Path, *, n_rows: int, hidden: int, in_memory: bool) -> None:
        """Create the files; no row is valid before the first `commit` or `restore`.

        Args:
            folder: working folder of the profile.
            n_rows: tokens of all batches together.
            hidden: H, or the width of all that layers hand on.
            in_memory: keep the rows in memory and copy them to the file at each commit; else work
                on the files themselves.
        """
        self._folder = folder
        self._n_rows = n_rows
        self._hidden = hidden
        self._row_bytes = hidden * 4
        self._rows = torch.empty(n_rows, hidden) if in_memory else None
        self._side = 0
        self._files: list[int] = []
        for side in range(2):
            path = folder / f"hidden-{'ab'[side]}.bin"
            self._files.append(os.open(path, os.O_RDWR | os.O_CREAT, 0o644))
            os.ftruncate(self._files[-1], self.size_bytes)

    @property
    def size_bytes(self) -> int:
        """Size of one boundary."""
        return self._n_rows * self._row_bytes

    def read(self, start: int, end: int) -> torch.Tensor:
        """Return rows [start, end) of the current boundary as a fresh [end - start, H] tensor."""
        if self._rows is not None:
            return self._rows[start:end].clone()
        rows = torch.empty(end - start, self._hidden)
        view = _bytes(rows)
        _transfer(os.preadv, self._files[self._side], view, start * self._row_bytes)
        return rows

    def write(self, start: int, rows: torch.Tensor) -> None:
        """Set rows of the *next* boundary; `commit` makes it the current one.

        Rows narrower than H, of shorter sequences in some models, are padded with zeros.
        """
        if rows.shape[1] < self._hidden:
            rows = torch.nn.functional.pad(rows, (0, self._hidden - rows.shape[1]))
        if self._rows is not None:
            self._rows[start : start + len(rows)] = rows
            return
        view = _bytes(rows.contiguous())
        _transfer(os.pwritev, self._files[1 - self._side], view, start * self._row_bytes)

    def commit(self, next_layer: int) -> None:
        """Make the written rows the current boundary, the input of decoder layer `next_layer`."""
        self._side = 1 - self._side
        digest = xxhash.xxh3_64()
        if self._rows is not None:
            view = _bytes(self._rows)
            digest.update(view)
            _transfer(os.pwritev, self._files[self._side], view, 0)
        else:
            for block in self._blocks():
                digest.update(block)
        state = {"next_layer": next_layer, "side": self._side, "xxh3": digest.hexdigest()}
        atomic_write_bytes(self._folder / "boundary.json", json.dumps(state).encode())

    def restore(self) -> int | None:
        """Load the last complete boundary; return the next decoder layer, None without one."""
        try:
            state = json.loads((self._folder / "boundary.json").read_text())
            next_layer, side, wanted = int(state["next_layer"]), int(state["side"]), state["xxh3"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if side not in (0, 1):
            return None
        self._side = side
        digest = xxhash.xxh3_64()
        position = 0
        for block in self._blocks():
            digest.update(block)
            if self._rows is not None:
                flat = self._rows.view(-1).numpy().view("uint8")
                flat[position : position + len(block)] = memoryview(block)
            position += len(block)
        return next_layer if digest.hexdigest() == wanted else None

    def close(self) -> None:
        """Close the files; they stay for a resume."""
        for file in self._files:
            os.close(file)
        self._files = []

    def _blocks(self) -> Iterator[bytes]:
        for offset in range(0, self.size_bytes, _COPY_BYTES):
            size = min(_COPY_BYTES, self.size_bytes - offset)
            yield os.pread(self._files[self._side], size, offset)


def _bytes(rows: torch.Tensor) -> memoryview:
    return rows.numpy().data.cast("B")


def _transfer(
    call: Callable[[int, list[memoryview], int], int], file: int, view: memoryview, offset: int
) -> None:
    done = 0
    while done < len(view):
        moved = call(file, [view[done:]], offset + done)
        if moved <= 0:
            raise OSError(f"hidden states: {done} of {len(view)} bytes moved at offset {offset}")
        done += moved
