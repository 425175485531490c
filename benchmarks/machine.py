"""The machine that a benchmark runs on, as its table says it."""

import os
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

BUSY_LOAD = 0.5
_FLAGS = (
    "avx2",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
)
_DEFAULT_CACHE_BYTES = 32 * 2**20
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What figures depend on, at one moment."""

    cpu_model: str
    n_cpus: int
    """That this process may use"""
    flags: tuple[str, ...]
    """Of the vector instructions that matter to kernels, those that are there"""
    last_level_cache_bytes: int
    memory_bytes: int
    load_average: float
    """Over the last minute"""
    date: str
    """UTC"""

    def to_row(self) -> dict[str, Any]:
        """Return the fields for a row of JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.n_cpus} x {self.cpu_model} ({' '.join(self.flags)}), "
            f"last-level cache {self.last_level_cache_bytes / 2**20:.0f} MiB, "
            f"memory {self.memory_bytes / 2**30:.0f} GiB, {self.date}"
        )


def describe_machine() -> Machine:
    """Return the machine as it is now."""
    cpu = _cpu_fields()
    flags = cpu.get("flags", "").split()
    return Machine(
        cpu_model=cpu.get("model name", "unknown"),
        n_cpus=len(os.sched_getaffinity(0)),
        flags=tuple(flag for flag in _FLAGS if flag in flags),
        last_level_cache_bytes=_last_level_cache_bytes(),
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        load_average=os.getloadavg()[0],
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def warn_if_busy(machine: Machine) -> None:
    """Say on stderr that other work runs: figures are then its figures too."""
    if machine.load_average > BUSY_LOAD:
        print(
            f"warning: the load is {machine.load_average:.2f} (over the last minute) before "
            f"anything was measured; wait until it is below {BUSY_LOAD}",
            file=sys.stderr,
        )


def drop_page_caches() -> None:
    """Forget all cached pages of the machine; without the right to, say so on stderr."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError as error:
        print(f"warning: the page cache stays as it is: {error.strerror}", file=sys.stderr)


def _cpu_fields() -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if not line.strip():
            break  # the others are alike
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    return fields


def _last_level_cache_bytes() -> int:
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * _UNITS[text[-1]] if text[-1] in _UNITS else int(text))
    return max(sizes, default=_DEFAULT_CACHE_BYTES)
