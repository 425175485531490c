"""A hardware profile whose numbers are easy to reckon with."""

from moe_tool.artifacts.hardware_profile import (
    DiskSpeed,
    ExpertSpeed,
    GpuSpeed,
    HardwareProfile,
    MemorySpeed,
)


def made_profile(**changed: object) -> HardwareProfile:
    """Return it; any field can be another one."""
    fields: dict[str, object] = {
        "tool_version": "0",
        "name": "tiny",
        "source": "measured",
        "cores": 8,
        "ram_bytes": 2**34,
        "kernels": "avx2",
        "disk": (
            DiskSpeed(pattern="sequential", read_bytes=4096, readers=1, bytes_per_s=9e9),
            DiskSpeed(pattern="random", read_bytes=4096, readers=1, bytes_per_s=1e9),
            DiskSpeed(pattern="random", read_bytes=4096, readers=4, bytes_per_s=2e9),
            DiskSpeed(pattern="random", read_bytes=65536, readers=1, bytes_per_s=3e9),
        ),
        "memory": (
            MemorySpeed(threads=1, bytes_per_s=1e10),
            MemorySpeed(threads=8, bytes_per_s=4e10),
        ),
        "experts": (
            ExpertSpeed(bits="4", tokens=16, threads=1, fixed_s=4.0, bytes_per_s=250.0),
            ExpertSpeed(bits="4", tokens=1, threads=1, fixed_s=1.0, bytes_per_s=1000.0),
            ExpertSpeed(bits="4", tokens=4, threads=1, fixed_s=2.0, bytes_per_s=500.0),
            ExpertSpeed(bits="4", tokens=1, threads=8, fixed_s=0.5, bytes_per_s=4000.0),
            ExpertSpeed(bits="native", tokens=1, threads=1, fixed_s=0.0, bytes_per_s=125.0),
        ),
        "layer_warm_s": 0.25,
        "layer_cold_s": 0.75,
        "layer_rested_s": 1.25,
        "cold_bytes": 1000,
        "gpu": GpuSpeed(
            name="G", memory_bytes=2**33, memory_bytes_per_s=1e12, link_bytes_per_s=2.5e10
        ),
    }
    return HardwareProfile(**(fields | changed))  # type: ignore[arg-type]
