"""Hardware profiles of common machines, derived from public data sheets, not measured.

Every number follows from a few figures of the sheets by the rules below, the same for all machines.
"""

from dataclasses import dataclass

from moe_tool import __version__
from moe_tool.artifacts.hardware_profile import (
    BITS,
    Bits,
    DiskSpeed,
    ExpertSpeed,
    GpuSpeed,
    HardwareProfile,
    MemorySpeed,
)
from moe_tool.errors import UsageError

# Disk. A sheet gives sequential reads with a deep queue, and random reads of 4 KiB one at a time,
# whose inverse is the latency. A reader has one piece under way, waits the latency and then gets it
# at the sequential rate; file system and full disks take a tenth of that.
_DISK_DERATING = 0.9
_PIECE_BYTES = 4 * 2**20
_RANDOM_BYTES = (256 * 2**10, 4 * 2**20, 24 * 2**20)
_READERS = (1, 2, 4)
# Memory. Two channels times transfer rate times 8 bytes; reading alone gets 75 to 85 % of it on
# desktops of every make.
_MEMORY_DERATING = 0.8
# One token reads an expert once, at a share of the memory bandwidth. The shares are those in
# docs/benchmarks.md of the AVX2 kernels with all cores; 8 bits, which it lacks, are taken as 4.
_SHARE: dict[Bits, float] = {"native": 0.83, "8": 0.75, "4": 0.75, "3": 0.71, "2": 0.60, "1": 0.48}
_CALL_S = 60e-6
"""Overhead of an expert call, as measured on a 2 vCPU EPYC of 2021"""
# Many tokens are bound by the cores. Multiply-adds per second of one core of that machine, whose
# boost clock is 3.5 GHz, with 64 tokens; AVX-512 is not counted on.
_CODE_PRODUCTS_PER_S = 7.5e10
_FLOAT_PRODUCTS_PER_S = 2.5e10
_MEASURED_GHZ = 3.5
_TOKENS = (1, 4, 16, 64)
# A decoder layer beside its matrices is one thread of Python and torch: the times of that machine,
# by the clock.
_LAYER_WARM_S = 0.6e-3
_LAYER_COLD_S = 1.1e-3
_LAYER_RESTED_S = 2.0e-3
_COLD_BYTES = 2 * 23 * 10**6


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSheet:
    """Published figures of one machine."""

    about: str
    """Description of the machine in one line"""
    cores: int
    ghz: float
    """Boost clock of one core"""
    ram_bytes: int
    memory_bytes_per_s: float
    """Transfers per second x 8 bytes x 2 channels"""
    core_bytes_per_s: float
    """Memory bandwidth that one core reaches, as measured on such cores; sheets lack it"""
    kernels: str
    """Fastest kernels that the processor can run"""
    disk_bytes_per_s: float
    """Rate of sequential reads"""
    disk_latency_s: float
    """Latency of a random read of 4 KiB, one at a time"""
    gpu: GpuSpeed | None = None


SHEETS: dict[str, DataSheet] = {
    "rtx4090-64gb": DataSheet(
        about="desktop, 24 GB GPU on PCIe 4.0 x16, 64 GB DDR5-5600, NVMe of 7 GB/s",
        cores=16,
        ghz=5.7,  # Ryzen 9 7950X
        ram_bytes=64 * 2**30,
        memory_bytes_per_s=89.6e9,  # 5600 MT/s x 16 bytes
        core_bytes_per_s=30e9,
        kernels="avx512vnni",
        disk_bytes_per_s=7.0e9,  # 7,000 MB/s, as on the sheets of PCIe 4.0 drives
        disk_latency_s=45e-6,  # 22,000 random reads per second
        gpu=GpuSpeed(
            name="GeForce RTX 4090",
            memory_bytes=24 * 2**30,
            memory_bytes_per_s=0.9 * 1008e9,  # 384 bits x 21 Gbit/s; copies reach nine tenths
            link_bytes_per_s=0.8 * 31.5e9,  # 16 lanes x 16 GT/s; packet headers take a fifth
        ),
    ),
    "laptop-16gb": DataSheet(
        about="laptop, 16 GB LPDDR5-6400 on 128 bits, NVMe of 3 GB/s",
        cores=8,
        ghz=4.7,
        ram_bytes=16 * 2**30,
        memory_bytes_per_s=102.4e9,  # 6400 MT/s x 16 bytes
        core_bytes_per_s=22e9,
        kernels="avx2",
        disk_bytes_per_s=3.0e9,  # PCIe 3.0 x4 or a cheap 4.0 drive
        disk_latency_s=70e-6,  # 14,000 random reads per second
    ),
    "desktop-sata-32gb": DataSheet(
        about="desktop, 32 GB DDR4-3200, SATA SSD",
        cores=6,
        ghz=4.2,  # Ryzen 5 3600
        ram_bytes=32 * 2**30,
        memory_bytes_per_s=51.2e9,  # 3200 MT/s x 16 bytes
        core_bytes_per_s=20e9,
        kernels="avx2",
        disk_bytes_per_s=0.56e9,  # 560 MB/s, as on every such sheet: the link has 6 Gbit/s
        disk_latency_s=77e-6,  # 13,000 random reads per second
    ),
    "minipc-32gb": DataSheet(
        about="mini PC, 32 GB DDR5-4800, NVMe of 5 GB/s",
        cores=8,
        ghz=5.1,  # Ryzen 7 7840HS
        ram_bytes=32 * 2**30,
        memory_bytes_per_s=76.8e9,  # 4800 MT/s x 16 bytes
        core_bytes_per_s=25e9,
        kernels="avx512vnni",
        disk_bytes_per_s=5.0e9,  # 5,000 MB/s: PCIe 4.0 drives without memory of their own
        disk_latency_s=55e-6,  # 18,000 random reads per second
    ),
}


def shipped_profile(name: str) -> HardwareProfile:
    """Return the profile derived from a data sheet.

    Raises:
        UsageError: no shipped profile has that name.
    """
    sheet = SHEETS.get(name)
    if sheet is None:
        raise UsageError(
            f"no profile named {name!r} is shipped", hint=f"there are {', '.join(SHEETS)}"
        )
    return HardwareProfile(
        tool_version=__version__,
        name=name,
        source="data-sheet",
        cores=sheet.cores,
        ram_bytes=sheet.ram_bytes,
        kernels=sheet.kernels,
        disk=_disk(sheet),
        memory=tuple(
            MemorySpeed(threads=threads, bytes_per_s=_memory(sheet, threads))
            for threads in sorted({1, 2, 4, sheet.cores})
        ),
        experts=tuple(
            _expert(sheet, bits, tokens, threads)
            for bits in BITS
            for threads in (1, sheet.cores)
            for tokens in _TOKENS
        ),
        layer_warm_s=_LAYER_WARM_S * _MEASURED_GHZ / sheet.ghz,
        layer_cold_s=_LAYER_COLD_S * _MEASURED_GHZ / sheet.ghz,
        layer_rested_s=_LAYER_RESTED_S * _MEASURED_GHZ / sheet.ghz,
        cold_bytes=_COLD_BYTES,
        gpu=sheet.gpu,
    )


def _disk(sheet: DataSheet) -> tuple[DiskSpeed, ...]:
    most = _DISK_DERATING * sheet.disk_bytes_per_s
    rows = [
        DiskSpeed(pattern="sequential", read_bytes=_PIECE_BYTES, readers=readers, bytes_per_s=most)
        for readers in _READERS
    ]
    for size in _RANDOM_BYTES:
        piece = min(size, _PIECE_BYTES)
        alone = piece / (sheet.disk_latency_s + piece / most)
        rows += [
            DiskSpeed(
                pattern="random",
                read_bytes=size,
                readers=readers,
                bytes_per_s=min(most, readers * alone),
            )
            for readers in _READERS
        ]
    return tuple(rows)


def _memory(sheet: DataSheet, threads: int) -> float:
    most = _MEMORY_DERATING * sheet.memory_bytes_per_s
    return min(most, threads * sheet.core_bytes_per_s)


def _expert(sheet: DataSheet, bits: Bits, tokens: int, threads: int) -> ExpertSpeed:
    from_memory = _SHARE[bits] * _memory(sheet, threads)
    of_a_core = _FLOAT_PRODUCTS_PER_S if bits == "native" else _CODE_PRODUCTS_PER_S
    products_per_s = threads * of_a_core * sheet.ghz / _MEASURED_GHZ
    stored_bits = 16 if bits == "native" else int(bits) + 0.25  # a float16 scale for 64 codes
    from_cores = products_per_s / tokens * stored_bits / 8
    return ExpertSpeed(
        bits=bits,
        tokens=tokens,
        threads=threads,
        fixed_s=_CALL_S,
        bytes_per_s=min(from_memory, from_cores),
    )
