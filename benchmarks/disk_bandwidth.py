"""How fast the disk gives a bundle's records, past the page cache, one after the other.

    python benchmarks/disk_bandwidth.py BUNDLE [--bytes 1GiB]

Whole records into aligned memory by O_DIRECT, with one and with two threads; the better of the two
is the disk's own limit.
"""

import argparse
import itertools
import json
import mmap
import os
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from machine import drop_page_caches

from moe_tool.budget.sizes import parse_bytes
from moe_tool.formats.bundle_reader import BundleReader

THREADS = (1, 2)
_N_BUFFERS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskBandwidth:
    """One measurement."""

    bytes_per_s: float
    """The best of all thread counts"""
    by_threads: dict[int, float]
    """Bytes per second"""
    block_bytes: int
    read_bytes: int
    """With each thread count"""


@dataclass(frozen=True, slots=True)
class _Block:
    handle: int
    offset: int


def measure_disk(bundle: Path, *, max_bytes: int) -> DiskBandwidth:
    """Read a bundle's records in file order, at most so many bytes, with one thread and with two.

    Empties the machine's page cache first. Both read different records where there are enough, so
    that nothing below the file system can remember them.

    Raises:
        OSError: the file system has no O_DIRECT, or the disk fails.
    """
    with BundleReader.open(bundle) as reader:
        table = reader.manifest.primaries[0]
    drop_page_caches()
    handles = {
        name: os.open(bundle / name, os.O_RDONLY | os.O_DIRECT)
        for name in sorted({record.file for record in table.records})
    }
    try:
        blocks = [_Block(handles[record.file], record.offset) for record in table.records]
        size = table.record_size_bytes
        n_blocks = max(1, min(len(blocks), max_bytes // size))
        by_threads = {}
        for turn, n_threads in enumerate(THREADS):
            start = turn * n_blocks if (turn + 1) * n_blocks <= len(blocks) else 0
            seconds = _read(blocks[start : start + n_blocks], size, n_threads)
            by_threads[n_threads] = n_blocks * size / seconds
    finally:
        for handle in handles.values():
            os.close(handle)
    return DiskBandwidth(
        bytes_per_s=max(by_threads.values()),
        by_threads=by_threads,
        block_bytes=size,
        read_bytes=n_blocks * size,
    )


def _read(blocks: list[_Block], size_bytes: int, n_threads: int) -> float:
    """Return the seconds that reading takes; the threads take the next block in turn."""
    # As many as are larger together than a cache: a store's slots do not lie in one either.
    buffers = [_aligned_buffer(size_bytes) for _ in range(_N_BUFFERS)]
    turns = itertools.cycle(buffers)
    left = iter(blocks)
    lock = threading.Lock()
    failures: list[OSError] = []

    def work() -> None:
        while True:
            with lock:
                block, buffer = next(left, None), next(turns)
            if block is None:
                return
            try:
                count = os.preadv(block.handle, [buffer], block.offset)
                if count != size_bytes:
                    raise OSError(f"{count} of {size_bytes} bytes at {block.offset}")
            except OSError as error:
                failures.append(error)
                return

    threads = [threading.Thread(target=work) for _ in range(n_threads)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    if failures:
        raise failures[0]
    return seconds


def _aligned_buffer(size_bytes: int) -> mmap.mmap:
    buffer = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):
        buffer.madvise(mmap.MADV_HUGEPAGE)
    for page in range(0, size_bytes, mmap.PAGESIZE):
        buffer[page] = 0  # faults belong to nobody's time
    return buffer


def main() -> None:
    """Measure once and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--bytes", type=parse_bytes, default=2**30)
    a = parser.parse_args()
    print(json.dumps(asdict(measure_disk(a.bundle, max_bytes=a.bytes))))


if __name__ == "__main__":
    main()
