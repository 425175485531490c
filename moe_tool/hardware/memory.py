"""Memory read bandwidth, by the fastest of several ways to read."""

import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch

from moe_tool.artifacts.hardware_profile import MemorySpeed
from moe_tool.hardware.timing import median_seconds
from moe_tool.progress import SILENT, Progress
from moe_tool.store.slots import SlotPool

_ROW_FLOATS = 4096
_BUDGET_S = 3.0


def measure_memory(
    threads: Sequence[int],
    *,
    size_bytes: int,
    repetitions: int,
    progress: Progress = SILENT,
) -> tuple[MemorySpeed, ...]:
    """Read a buffer repeatedly; sets torch's threads.

    Args:
        size_bytes: size of the buffer, a multiple of 16 KiB beyond any cache.
        repetitions: readings in each way; the median counts.
    """
    memory = SlotPool(n_slots=1, slot_size_bytes=size_bytes).view(0)  # on large pages
    buffer = memory.view(torch.float32).view(-1, _ROW_FLOATS).fill_(0.5)
    rows = []
    progress.begin("read memory", len(threads), "numbers of threads")
    for n_threads in threads:
        torch.set_num_threads(n_threads)
        ways = _ways(buffer, n_threads)
        seconds = min(median_seconds(ways, repetitions=repetitions, budget_s=_BUDGET_S))
        rows.append(
            MemorySpeed(threads=n_threads, bytes_per_s=buffer.numel() * 4 / max(seconds, 1e-9))
        )
        progress.advance()
    progress.end()
    return tuple(rows)


def _ways(buffer: torch.Tensor, n_threads: int) -> list[Callable[[], object]]:
    """Return a sum and a product in torch, and a sum in numpy threads, which release the GIL."""
    vector = torch.full((_ROW_FLOATS,), 0.5)
    parts = np.array_split(buffer.numpy().reshape(-1).view(np.int64), n_threads)
    return [buffer.sum, lambda: torch.mv(buffer, vector), lambda: _sum_parts(parts)]


def _sum_parts(parts: list[np.ndarray]) -> None:
    others = [threading.Thread(target=part.sum) for part in parts[1:]]
    for thread in others:
        thread.start()
    parts[0].sum()
    for thread in others:
        thread.join()
