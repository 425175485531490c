"""Read rate of the disk for whole records, past the page cache, sequential and random."""

import itertools
import mmap
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from moe_tool.artifacts.hardware_profile import DiskSpeed
from moe_tool.errors import NotFoundError, StorageError
from moe_tool.formats.atomic_write import require_free_disk, storage_errors
from moe_tool.formats.record_files import RecordFiles
from moe_tool.progress import SILENT, Progress
from moe_tool.store.reader import RecordReader
from moe_tool.store.slots import SlotPool

READERS = (1, 2, 4)
RANDOM_BYTES = (256 * 2**10, 4 * 2**20, 24 * 2**20)
SEQUENTIAL_BYTES = 4 * 2**20
_REST_S = 4e-3
"""Pause between bursts: about the time that a layer computes"""
_MAX_BURSTS = 64
_N_BUFFERS = 12
"""Buffers that exceed the CPU cache together, so that reads go to memory"""
_WRITE_BYTES = 4 * 2**20
_ROOM_BYTES = 2**28
"""Left free on the disk beside the test file: other programs write there too"""


@dataclass(frozen=True, slots=True, kw_only=True)
class _TestFile:
    """Unlinked file: it disappears when its last descriptor closes, however the process ends."""

    files: RecordFiles
    name: str
    handle: int
    """Descriptor of buffered I/O, to drop the file from the page cache"""


def measure_disk(
    folder: Path,
    *,
    file_bytes: int,
    pass_s: float,
    repetitions: int = 3,
    random_bytes: Sequence[int] = RANDOM_BYTES,
    sequential_bytes: int = SEQUENTIAL_BYTES,
    progress: Progress = SILENT,
) -> tuple[DiskSpeed, ...]:
    """Write a test file, read it as a store reads records, and remove it.

    Reads bypass the page cache where the file system allows it, else the file is dropped from the
    cache before each reading. Caches of the disk itself or of a virtual machine's host still count.

    Args:
        file_bytes: size of the test file, a multiple of 4 MiB, at least the largest read.
        pass_s: seconds after which no reader begins another read.
        repetitions: readings of each kind; the median counts.
        random_bytes: sizes of reads in random order, multiples of 4096.

    Raises:
        NotFoundError: the folder does not exist.
        DiskFullError: it has no room for the test file.
        StorageError: the disk fails.
    """
    if not folder.is_dir():
        raise NotFoundError(
            f"{folder} is not a folder", hint="name one on the disk that bundles will lie on"
        )
    require_free_disk(folder, file_bytes + _ROOM_BYTES)
    kinds: list[tuple[Literal["sequential", "random"], int]] = [
        ("sequential", sequential_bytes),
        *(("random", size) for size in random_bytes),
    ]
    n_readings = len(kinds) * len(READERS) * repetitions
    with storage_errors(folder), _test_file(folder, file_bytes, progress) as file:
        progress.begin("read the test file", n_readings, "readings")
        buffers, order = _buffers(max(size for _, size in kinds)), np.random.default_rng(0)
        rows = []
        for pattern, size in kinds:
            targets = [buffer[:size] for buffer in buffers]
            for readers in READERS:
                rates = []
                for _ in range(repetitions):
                    reads = np.arange(file_bytes // size)
                    if not file.files.is_direct:
                        os.posix_fadvise(file.handle, 0, 0, os.POSIX_FADV_DONTNEED)
                    if pattern == "random":
                        order.shuffle(reads)
                        rates.append(_read_bursts(file, reads, targets, readers, pass_s))
                    else:
                        rates.append(_read(file, reads * size, targets[:readers], pass_s))
                    progress.advance()
                rate = statistics.median(rates)
                rows.append(
                    DiskSpeed(pattern=pattern, read_bytes=size, readers=readers, bytes_per_s=rate)
                )
        progress.end()
    return tuple(rows)


@contextmanager
def _test_file(folder: Path, size_bytes: int, progress: Progress) -> Iterator[_TestFile]:
    with ExitStack() as opened:
        handle, path = tempfile.mkstemp(prefix=".moe-tool-disk-", suffix=".part", dir=folder)
        opened.callback(os.close, handle)
        name = Path(path).name
        try:
            # One block, so that direct reads can be tried before the whole file is written.
            os.pwrite(handle, bytes(mmap.PAGESIZE), 0)
            files = RecordFiles(folder, [name])
            opened.callback(files.close)
            refusal = files.read_directly()
        finally:
            os.unlink(path)
        if refusal is not None:
            progress.note(f"{refusal}: the disk is measured through the page cache")
        _fill(handle, size_bytes, progress)
        yield _TestFile(files=files, name=name, handle=handle)


def _fill(handle: int, size_bytes: int, progress: Progress) -> None:
    """Write random bytes, which no file system can compress."""
    progress.begin("write a test file", size_bytes, "bytes")
    os.posix_fallocate(handle, 0, size_bytes)
    draw = np.random.default_rng(0)
    for offset in range(0, size_bytes, _WRITE_BYTES):
        piece = memoryview(draw.bytes(min(_WRITE_BYTES, size_bytes - offset)))
        while piece:
            count = os.pwrite(handle, piece, offset)
            piece, offset = piece[count:], offset + count
        progress.advance(_WRITE_BYTES)
    os.fsync(handle)
    progress.end()


def _buffers(size_bytes: int) -> list[torch.Tensor]:
    """Return buffers as a store has them: on huge pages, without which large reads took up to three
    times as long, and written to, so that no page fault is timed."""
    pool = SlotPool(n_slots=_N_BUFFERS, slot_size_bytes=size_bytes)
    return [pool.view(slot).zero_() for slot in range(_N_BUFFERS)]


def _read_bursts(
    file: _TestFile, reads: np.ndarray, buffers: list[torch.Tensor], readers: int, pass_s: float
) -> float:
    """Return bytes per second of bursts of one record per reader, awaited as a layer awaits misses.
    Disk and cores go idle between bursts and have to wake up."""

    def read(layer: int, expert: int, out: torch.Tensor, **_: object) -> None:
        _read_whole(file, expert * len(out), out)

    reader, n_bytes, seconds = RecordReader(read, n_readers=readers), 0, 0.0
    turns = itertools.cycle(buffers)
    try:
        for first in range(0, min(len(reads), _MAX_BURSTS * readers), readers):
            time.sleep(_REST_S)
            began = time.perf_counter()
            burst = reads[first : first + readers].tolist()
            for record in burst:
                reader.start((0, record), next(turns))
            for _ in burst:
                arrival = reader.next_arrival()
                if arrival.error is not None:
                    raise arrival.error
                n_bytes += len(buffers[0])
            seconds += time.perf_counter() - began
            if seconds > pass_s:
                break
        return n_bytes / seconds
    finally:
        reader.close()


def _read(
    file: _TestFile, offsets: Sequence[int] | np.ndarray, buffers: list[torch.Tensor], pass_s: float
) -> float:
    """Return bytes per second of readers that each take the next record in turn."""
    turns = iter(offsets)
    lock = threading.Lock()
    end = time.perf_counter() + pass_s

    def work(buffer: torch.Tensor) -> int:
        n_bytes = 0
        while n_bytes == 0 or time.perf_counter() < end:
            with lock:
                offset = next(turns, None)
            if offset is None:
                break
            _read_whole(file, int(offset), buffer)
            n_bytes += len(buffer)
        return n_bytes

    with ThreadPoolExecutor(len(buffers)) as pool:
        start = time.perf_counter()
        n_bytes = sum(pool.map(work, buffers))
        return n_bytes / (time.perf_counter() - start)


def _read_whole(file: _TestFile, offset: int, out: torch.Tensor) -> None:
    count = file.files.read_into(file.name, offset, out)
    if count != len(out):
        raise StorageError(
            f"the disk gave {count} of {len(out)} bytes of its test file", hint="check the disk"
        )
