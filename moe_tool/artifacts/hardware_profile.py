"""Hardware profile: measured rates of disk, memory, experts and layers that predictions use."""

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, TypeVar

from pydantic import Field, model_validator

from moe_tool.artifacts.schema import FrozenModel

Bits = Literal["native", "8", "4", "3", "2", "1"]
BITS: tuple[Bits, ...] = ("native", "8", "4", "3", "2", "1")
Count = Annotated[int, Field(ge=1, le=2**31)]
SizeBytes = Annotated[int, Field(ge=1, le=2**60)]
Rate = Annotated[float, Field(ge=1, le=1e15)]
"""Rate in bytes per second"""
Seconds = Annotated[float, Field(ge=0, le=1e4)]

_NATIVE_BITS = 16
REST_S = 0.01
Row = TypeVar("Row")


class DiskSpeed(FrozenModel):
    """Disk rate of one access pattern, read size and number of readers."""

    pattern: Literal["sequential", "random"]
    """Access pattern; random: each reader reads one record, all finish before the next round"""
    read_bytes: SizeBytes
    readers: Annotated[int, Field(ge=1, le=4)]
    """Threads that read at once"""
    bytes_per_s: Rate
    """Total rate of all readers"""


class MemorySpeed(FrozenModel):
    """Memory read bandwidth with a number of threads."""

    threads: Count
    bytes_per_s: Rate
    """Total rate of all threads"""


class ExpertSpeed(FrozenModel):
    """Time of one expert call: fixed_s + record_bytes / bytes_per_s, fitted to two record sizes.

    Below the smaller size, time is a straight line from there to `tiny_s` at 0 bytes.
    """

    bits: Bits
    """Bits per weight of the matrices; native is bfloat16"""
    tokens: Count
    threads: Count
    fixed_s: Seconds
    bytes_per_s: Rate
    """Rate at which a record is processed"""
    fitted_from_bytes: SizeBytes | None = None
    """Smaller of the two record sizes; None where nothing below it was measured"""
    tiny_s: Seconds | None = None
    """Time of a call with almost no weights; None if not measured"""

    def seconds(self, record_bytes: float) -> float:
        """Return the time of a call with a record of `record_bytes` bytes."""
        if (
            self.tiny_s is None
            or self.fitted_from_bytes is None
            or record_bytes >= self.fitted_from_bytes
        ):
            return self.fixed_s + record_bytes / self.bytes_per_s
        # Extrapolated to 0 bytes, the fitted line would give the noise of `fixed_s`.
        at_fitted = self.fixed_s + self.fitted_from_bytes / self.bytes_per_s
        tiny = min(self.tiny_s, at_fitted)
        return tiny + (at_fitted - tiny) * record_bytes / self.fitted_from_bytes


class LookupSpeed(FrozenModel):
    """Time of a low-bit matrix product by multiplication and by lookup, with equal results."""

    bits: Literal["1", "2"]
    tokens: Count
    multiply_s: Seconds
    lookup_s: Seconds
    is_used: bool
    """Whether products of up to `tokens` tokens use lookup"""


class GpuSpeed(FrozenModel):
    """Memory and link bandwidth of a GPU."""

    name: Annotated[str, Field(max_length=256)]
    memory_bytes: SizeBytes
    memory_bytes_per_s: Rate
    link_bytes_per_s: Rate
    """Bandwidth of copies from pinned host memory"""


class HardwareProfile(FrozenModel):
    """Artifact of `moe-tool hardware`."""

    kind: Literal["hardware"] = "hardware"
    format_version: Literal[1] = 1
    tool_version: str
    name: Annotated[str, Field(max_length=256)]
    source: Literal["measured", "data-sheet"]
    """Origin of the figures; data-sheet: derived from published figures, not measured"""
    cores: Count
    """CPU cores that a process may use"""
    ram_bytes: SizeBytes
    kernels: str
    """Kernels of the expert timings: avx512vnni, avx512, avx2, scalar or torch"""
    disk: Annotated[tuple[DiskSpeed, ...], Field(min_length=1)]
    memory: Annotated[tuple[MemorySpeed, ...], Field(min_length=1)]
    experts: Annotated[tuple[ExpertSpeed, ...], Field(min_length=1)]
    lookup: tuple[LookupSpeed, ...] = ()
    """Lookup times; empty if the kernels have no lookup, or it was not measured"""
    layer_warm_s: Annotated[float, Field(gt=0, le=1e4)]
    """Time of one decoder layer at one token without its matrices, caches warm"""
    layer_cold_s: Annotated[float, Field(gt=0, le=1e4)]
    """Time of the layer when `cold_bytes` of expert weights per layer pass through the caches"""
    cold_bytes: SizeBytes
    layer_rested_s: Annotated[float, Field(gt=0, le=1e4)]
    """Time of the layer after it waits REST_S for the disk, wait not included: idle cores wake
    slowly"""
    gpu: GpuSpeed | None = None

    @model_validator(mode="after")
    def _has_random_reads(self) -> "HardwareProfile":
        if all(row.pattern != "random" for row in self.disk):
            raise ValueError("no random read was measured, and records are read in random order")
        return self

    def disk_bytes_per_s(self, read_bytes: int, readers: int) -> float:
        """Return the rate of random reads measured nearest to these arguments.

        Nearest by size (as a ratio), then by readers; ties go to the smaller.

        Args:
            read_bytes: size of one read, at least 1.
        """
        rows = [row for row in self.disk if row.pattern == "random"]
        rows = _nearest(rows, lambda row: math.log(row.read_bytes), math.log(read_bytes))
        return _nearest(rows, lambda row: row.readers, readers)[0].bytes_per_s

    def memory_bytes_per_s(self, threads: int) -> float:
        """Return the rate at the nearest measured number of threads."""
        return _nearest(self.memory, lambda row: row.threads, threads)[0].bytes_per_s

    def expert_seconds(self, bits: str, record_bytes: float, tokens: int, threads: int) -> float:
        """Return the time of one expert call.

        Uses the nearest measured width (as a ratio) and number of threads. Over tokens, time is
        interpolated and extrapolated linearly, but constant below the fewest measured.

        Args:
            bits: width of the matrices, as in `pack --bits`.
        """
        rows = _nearest(
            self.experts, lambda row: math.log(_width(row.bits)), math.log(_width(bits))
        )
        rows = _nearest(rows, lambda row: row.threads, threads)
        points = sorted((row.tokens, row.seconds(record_bytes)) for row in rows)
        return _on_line(points, tokens)

    def layer_seconds(self, touched_bytes: int) -> float:
        """Return the time of a decoder layer at one token without its matrices.

        Args:
            touched_bytes: bytes of weights that are read per layer.
        """
        share = min(1.0, touched_bytes / self.cold_bytes)
        return self.layer_warm_s + (self.layer_cold_s - self.layer_warm_s) * share

    @property
    def waking_s(self) -> float:
        """Extra time of a layer after a wait of REST_S or more."""
        return max(0.0, self.layer_rested_s - self.layer_cold_s)


def _width(bits: str) -> int:
    return _NATIVE_BITS if bits == "native" else int(bits[0])


def _nearest(rows: Sequence[Row], where: Callable[[Row], float], wanted: float) -> list[Row]:
    """Return all rows at the place nearest to the wanted one; ties go to the lower place."""
    place = min((where(row) for row in rows), key=lambda found: (abs(found - wanted), found))
    return [row for row in rows if where(row) == place]


def _on_line(points: Sequence[tuple[int, float]], wanted: int) -> float:
    """Interpolate linearly through ascending points; extrapolate beyond the last, never falling."""
    if wanted <= points[0][0] or len(points) == 1:
        return points[0][1]
    after = next((i for i, point in enumerate(points) if point[0] >= wanted), len(points) - 1)
    (left, low), (right, high) = points[after - 1], points[after]
    if left == right:
        return high
    slope = (high - low) / (right - left)
    if wanted > right:
        return high + max(0.0, slope) * (wanted - right)
    return low + slope * (wanted - left)
