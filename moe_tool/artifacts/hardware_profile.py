"""How fast one machine reads, multiplies and walks through decoder layers: what every prediction of
a speed rests on."""

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, TypeVar

from pydantic import Field, model_validator

from moe_tool.artifacts.schema import FrozenModel

HARDWARE_VERSION: Literal[1] = 1
Bits = Literal["native", "8", "4", "3", "2", "1"]
BITS: tuple[Bits, ...] = ("native", "8", "4", "3", "2", "1")
Count = Annotated[int, Field(ge=1, le=2**31)]
SizeBytes = Annotated[int, Field(ge=1, le=2**60)]
Rate = Annotated[float, Field(ge=1, le=1e15)]
"""Bytes per second"""
Seconds = Annotated[float, Field(ge=0, le=1e4)]

_NATIVE_BITS = 16
REST_S = 0.01
Row = TypeVar("Row")


class DiskSpeed(FrozenModel):
    """What the disk gives to one way of reading."""

    pattern: Literal["sequential", "random"]
    """random: as many records as there are readers at once, all waited for before the next ones"""
    read_bytes: SizeBytes
    """Of one read"""
    readers: Annotated[int, Field(ge=1, le=4)]
    """Threads that read at once"""
    bytes_per_s: Rate
    """All readers together"""


class MemorySpeed(FrozenModel):
    """What memory gives to the fastest way of reading it."""

    threads: Count
    bytes_per_s: Rate
    """All threads together"""


class ExpertSpeed(FrozenModel):
    """What one expert call takes: fixed_s + record_bytes / bytes_per_s, fitted to two sizes; below
    the smaller one a straight line from there to a call with hardly any weights."""

    bits: Bits
    """Of the matrices; native is bfloat16"""
    tokens: Count
    """That the expert is given at once"""
    threads: Count
    fixed_s: Seconds
    bytes_per_s: Rate
    """Of the record"""
    fitted_from_bytes: SizeBytes | None = None
    """The smaller of the two sizes; None where nothing below it was measured"""
    tiny_s: Seconds | None = None
    """What a call takes whose weights are next to nothing; None where it was not measured"""

    def seconds(self, record_bytes: float) -> float:
        """Return what a call takes with a record of so many bytes."""
        if (
            self.tiny_s is None
            or self.fitted_from_bytes is None
            or record_bytes >= self.fitted_from_bytes
        ):
            return self.fixed_s + record_bytes / self.bytes_per_s
        # Carried on below the fitted sizes, the line would end in what noise made of `fixed_s`.
        at_fitted = self.fixed_s + self.fitted_from_bytes / self.bytes_per_s
        tiny = min(self.tiny_s, at_fitted)
        return tiny + (at_fitted - tiny) * record_bytes / self.fitted_from_bytes


class LookupSpeed(FrozenModel):
    """A product with weights of few bits, multiplied and looked up; the results are the same."""

    bits: Literal["1", "2"]
    tokens: Count
    multiply_s: Seconds
    lookup_s: Seconds
    is_used: bool
    """Whether products of up to so many tokens were looked up"""


class GpuSpeed(FrozenModel):
    """A GPU beside the processor."""

    name: Annotated[str, Field(max_length=256)]
    memory_bytes: SizeBytes
    memory_bytes_per_s: Rate
    """Of its own memory"""
    link_bytes_per_s: Rate
    """From pinned memory of the host"""


class HardwareProfile(FrozenModel):
    """The artifact of `moe-tool hardware`."""

    kind: Literal["hardware"] = "hardware"
    format_version: Literal[1] = HARDWARE_VERSION
    tool_version: str
    name: Annotated[str, Field(max_length=256)]
    source: Literal["measured", "data-sheet"]
    """data-sheet: nobody ran anything on such a machine"""
    cores: Count
    """That a process may use"""
    ram_bytes: SizeBytes
    """Of the machine"""
    kernels: str
    """avx512vnni, avx512, avx2, scalar or torch: what the experts were computed with"""
    disk: Annotated[tuple[DiskSpeed, ...], Field(min_length=1)]
    memory: Annotated[tuple[MemorySpeed, ...], Field(min_length=1)]
    experts: Annotated[tuple[ExpertSpeed, ...], Field(min_length=1)]
    lookup: tuple[LookupSpeed, ...] = ()
    """Empty where the kernels look nothing up, or nobody measured"""
    layer_warm_s: Annotated[float, Field(gt=0, le=1e4)]
    """Of one decoder layer at one token beside its matrices, nothing else between"""
    layer_cold_s: Annotated[float, Field(gt=0, le=1e4)]
    """The same where every layer streams `cold_bytes` of expert weights through the caches"""
    cold_bytes: SizeBytes
    layer_rested_s: Annotated[float, Field(gt=0, le=1e4)]
    """As `layer_cold_s`, where every layer waits REST_S before its experts, as for the disk: cores
    fall asleep meanwhile, and what comes after takes longer. The wait itself is not in it"""
    gpu: GpuSpeed | None = None

    @model_validator(mode="after")
    def _has_random_reads(self) -> "HardwareProfile":
        if all(row.pattern != "random" for row in self.disk):
            raise ValueError("no random read was measured, and records are read in no order")
        return self

    def disk_bytes_per_s(self, read_bytes: int, readers: int) -> float:
        """Return the rate of random reads measured nearest to this: by size, as a ratio, then by
        the number of readers; of two equally near the smaller.

        Args:
            read_bytes: of one read, at least 1.
            readers: threads that read at once.
        """
        rows = [row for row in self.disk if row.pattern == "random"]
        rows = _nearest(rows, lambda row: math.log(row.read_bytes), math.log(read_bytes))
        return _nearest(rows, lambda row: row.readers, readers)[0].bytes_per_s

    def memory_bytes_per_s(self, threads: int) -> float:
        """Return the rate at the nearest measured number of threads."""
        return _nearest(self.memory, lambda row: row.threads, threads)[0].bytes_per_s

    def expert_seconds(self, bits: str, record_bytes: float, tokens: int, threads: int) -> float:
        """Return what one call of an expert takes.

        Of the nearest measured width (as a ratio) and number of threads. Between measured numbers
        of tokens, and beyond the largest, time is a straight line; below the smallest it is that
        one's.

        Args:
            bits: of its matrices, as `pack --bits` takes it.
            record_bytes: of its record.
            tokens: that it is given at once.
            threads: that compute.
        """
        rows = _nearest(
            self.experts, lambda row: math.log(_width(row.bits)), math.log(_width(bits))
        )
        rows = _nearest(rows, lambda row: row.threads, threads)
        points = sorted((row.tokens, row.seconds(record_bytes)) for row in rows)
        return _on_line(points, tokens)

    def layer_seconds(self, touched_bytes: int) -> float:
        """Return what a decoder layer costs beside its matrices at one token.

        Args:
            touched_bytes: of weights that are read per layer.
        """
        share = min(1.0, touched_bytes / self.cold_bytes)
        return self.layer_warm_s + (self.layer_cold_s - self.layer_warm_s) * share

    @property
    def waking_s(self) -> float:
        """What a wait of REST_S or more adds to the layer that waited."""
        return max(0.0, self.layer_rested_s - self.layer_cold_s)


def _width(bits: str) -> int:
    return _NATIVE_BITS if bits == "native" else int(bits[0])


def _nearest(rows: Sequence[Row], where: Callable[[Row], float], wanted: float) -> list[Row]:
    """All rows at the place nearest to the wanted one, in their order; the lower of two."""
    place = min((where(row) for row in rows), key=lambda found: (abs(found - wanted), found))
    return [row for row in rows if where(row) == place]


def _on_line(points: Sequence[tuple[int, float]], wanted: int) -> float:
    """The broken line through points that ascend, carried on beyond the last one but never down."""
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
