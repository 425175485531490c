"""Bandwidth of copies to a GPU and of its own memory."""

import statistics
from collections.abc import Callable

import torch

from moe_tool.artifacts.hardware_profile import GpuSpeed
from moe_tool.progress import SILENT, Progress

_RECORD_BYTES = 24 * 2**20
_MEMORY_BYTES = 2**29
"""Copy size beyond any GPU cache"""
_REPETITIONS = 10


def measure_gpu(*, progress: Progress = SILENT) -> GpuSpeed | None:
    """Return the bandwidths of the first GPU that torch can use, None without one."""
    if not torch.cuda.is_available():
        return None
    progress.begin("copy to the GPU", 2, "kinds of copy")
    properties = torch.cuda.get_device_properties(0)
    host = torch.zeros(_RECORD_BYTES, dtype=torch.uint8).pin_memory()
    record = torch.empty_like(host, device="cuda")
    link_s = _median_seconds(lambda: record.copy_(host, non_blocking=True))
    progress.advance()
    one = torch.zeros(_MEMORY_BYTES, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(one)
    copy_s = _median_seconds(lambda: other.copy_(one))
    progress.end()
    return GpuSpeed(
        name=properties.name,
        memory_bytes=properties.total_memory,
        memory_bytes_per_s=2 * _MEMORY_BYTES / copy_s,  # read once and written once
        link_bytes_per_s=_RECORD_BYTES / link_s,
    )


def _median_seconds(call: Callable[[], object]) -> float:
    """Return the median by GPU events: a call returns before its work is done."""
    seconds: list[float] = []
    for repetition in range(_REPETITIONS + 2):
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        end.synchronize()
        if repetition >= 2:  # the first ones initialise the GPU
            seconds.append(start.elapsed_time(end) / 1e3)
    return statistics.median(seconds)
