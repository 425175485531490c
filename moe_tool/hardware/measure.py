"""Measure a machine: disk, memory, experts, decoder layers, GPU."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_tool import __version__
from moe_tool.artifacts.hardware_profile import ExpertSpeed, HardwareProfile, LookupSpeed
from moe_tool.available_memory import available_memory_bytes
from moe_tool.budget.sizes import format_bytes
from moe_tool.errors import BudgetError
from moe_tool.hardware.disk import measure_disk
from moe_tool.hardware.experts import Shape, measure_experts
from moe_tool.hardware.gpu import measure_gpu
from moe_tool.hardware.layers import LayerShape, LayerTimes, measure_layers
from moe_tool.hardware.memory import measure_memory
from moe_tool.hardware.synthetic_records import make_block
from moe_tool.native.kernels import kernels_in_use, set_threads
from moe_tool.native.lookup_choice import choose_lookup, chosen_tokens
from moe_tool.progress import SILENT, Progress

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
_CACHES_TO_FILL = 4
_BUSY_LOAD = 0.5
_ROOM_BYTES = 2**29
"""Memory that torch and transformers take beside the measured buffers"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """Sizes and time limits of the measurements."""

    disk_bytes: int
    """Size of the test file"""
    disk_pass_s: float
    memory_bytes: int
    """Size of the buffer that is read"""
    block_bytes: int
    """Minimum size of all experts together"""
    repetitions: int
    tokens: tuple[int, ...]
    """Numbers of tokens per expert call"""
    expert_s: float
    """Time for the repetitions of one kind of expert call"""
    decoded_tokens: int
    decode_s: float
    expert_shapes: tuple[Shape, Shape] | None = None
    """Two shapes of expert to fit through; None: the defaults"""
    layer_shape: LayerShape = LayerShape()


FULL = Effort(
    disk_bytes=2**30,
    disk_pass_s=0.5,
    memory_bytes=2**29,
    block_bytes=2**28,
    repetitions=7,
    tokens=(1, 4, 16, 64),
    expert_s=0.25,
    decoded_tokens=40,
    decode_s=6.0,
)
QUICK = Effort(
    disk_bytes=2**28,
    disk_pass_s=0.12,
    memory_bytes=2**28,
    block_bytes=2**28,
    repetitions=3,
    tokens=(1, 16),
    expert_s=0.05,
    decoded_tokens=10,
    decode_s=1.5,
)


def measure_hardware(
    disk_folder: Path, *, quick: bool = False, progress: Progress = SILENT
) -> HardwareProfile:
    """Measure disk, memory, experts and layers in turn; nothing else should run meanwhile.

    Sets the threads of the kernels and of torch, and resets both at the end.

    Args:
        disk_folder: on the disk that bundles lie on; a test file is written there and removed.
        quick: fewer repetitions and kinds of call, a smaller test file.

    Raises:
        NotFoundError, DiskFullError, StorageError: see `measure_disk`.
        BudgetError: memory is too small to measure beyond the caches.
        UsageError: `MOE_TOOL_KERNELS` names kernels that are not there.
    """
    effort = QUICK if quick else FULL
    kernels = kernels_in_use()
    cores = len(os.sched_getaffinity(0))
    block_bytes = max(effort.block_bytes, _CACHES_TO_FILL * _last_level_cache_bytes())
    _require_memory(max(effort.memory_bytes, block_bytes) + _ROOM_BYTES)
    _warn_if_busy(progress)
    torch_threads = torch.get_num_threads()
    try:
        disk = measure_disk(
            disk_folder,
            file_bytes=effort.disk_bytes,
            pass_s=effort.disk_pass_s,
            progress=progress,
        )
        memory = measure_memory(
            _thread_counts(cores),
            size_bytes=effort.memory_bytes,
            repetitions=effort.repetitions,
            progress=progress,
        )
        set_threads(cores)
        lookup = _lookup_speeds()  # before experts: it chooses what computes them
        experts, layer = _compute_speeds(make_block(block_bytes), effort, cores, progress)
    finally:
        torch.set_num_threads(torch_threads)
        set_threads(cores)
    return HardwareProfile(
        tool_version=__version__,
        name=f"{cores} x {_processor()}"[:256],
        source="measured",
        cores=cores,
        ram_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        kernels=kernels,
        disk=disk,
        memory=memory,
        experts=experts,
        lookup=lookup,
        layer_warm_s=layer.warm_s,
        layer_cold_s=layer.cold_s,
        layer_rested_s=layer.rested_s,
        cold_bytes=layer.cold_bytes,
        gpu=measure_gpu(progress=progress),
    )


def _warn_if_busy(progress: Progress) -> None:
    load = os.getloadavg()[0]
    if load > _BUSY_LOAD:
        progress.note(
            f"the load average was {load:.2f} over the last minute: other programs make these "
            f"figures worse; measure again when it is below {_BUSY_LOAD}"
        )


def _compute_speeds(
    block: torch.Tensor, effort: Effort, cores: int, progress: Progress
) -> tuple[tuple[ExpertSpeed, ...], LayerTimes]:
    experts = measure_experts(
        block,
        threads=sorted({1, cores}),
        tokens=effort.tokens,
        repetitions=effort.repetitions,
        budget_s=effort.expert_s,
        shapes=effort.expert_shapes,
        progress=progress,
    )
    layer = measure_layers(
        block,
        n_threads=cores,
        n_tokens=effort.decoded_tokens,
        budget_s=effort.decode_s,
        shape=effort.layer_shape,
        progress=progress,
    )
    return experts, layer


def _lookup_speeds() -> tuple[LookupSpeed, ...]:
    times = choose_lookup()
    return tuple(
        LookupSpeed(
            bits="1" if row.bits == 1 else "2",
            tokens=row.tokens,
            multiply_s=row.multiply_s,
            lookup_s=row.lookup_s,
            is_used=row.tokens <= chosen_tokens(times, row.bits),
        )
        for row in times
    )


def _thread_counts(cores: int) -> list[int]:
    """Return 1, 2, 4, ... and all cores."""
    return sorted({2**power for power in range(cores.bit_length()) if 2**power <= cores} | {cores})


def _require_memory(needed_bytes: int) -> None:
    available = available_memory_bytes()
    if available < needed_bytes:
        raise BudgetError(
            f"measuring beyond the caches takes {format_bytes(needed_bytes)} of memory "
            f"({needed_bytes} bytes), available are {format_bytes(available)} ({available} bytes)",
            hint="end other programs, or take a data sheet's figures: moe-tool hardware --list",
        )


def _last_level_cache_bytes() -> int:
    """Return the size of the last-level cache, 0 where the system does not tell."""
    sizes = [0]
    for path in _CACHES.glob("index*/size"):
        try:
            text = path.read_text().strip()
            sizes.append(int(text.rstrip("KMG")) * _UNITS.get(text[-1:], 1))
        except (OSError, ValueError):
            continue
    return max(sizes)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] else platform.machine() or "unknown processor"
