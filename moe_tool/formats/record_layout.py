"""Layout of one record: named, aligned segments, so that one aligned read fetches it.

Every segment is padded with zeros to ALIGNMENT_BYTES. Little-endian throughout.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from moe_tool.artifacts.form_table import ALIGNMENT_BYTES
from moe_tool.errors import CorruptArtifactError
from moe_tool.formats.integer_parts import are_finite

REPACK = "pack the bundle again with moe-tool pack"
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "uint8": torch.uint8,
    "float8_e4m3fn": torch.float8_e4m3fn,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One part of a record."""

    name: str
    offset: int
    """Offset from the start of the record, a multiple of ALIGNMENT_BYTES"""
    size_bytes: int
    """Size with padding, a multiple of ALIGNMENT_BYTES"""
    n_bytes: int
    """Size without padding"""
    dtype: str
    shape: tuple[int, ...]

    def view(self, record: torch.Tensor) -> torch.Tensor:
        """Return the segment of a record, uint8 [record size], as a view of its dtype and shape."""
        raw = record[self.offset : self.offset + self.n_bytes]
        return raw.view(_DTYPES[self.dtype]).view(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordLayout:
    """The segments of every record of one form."""

    segments: tuple[Segment, ...]
    size_bytes: int
    """Size of a record, padding included"""

    def fill(self, values: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """Return a record, uint8 [size_bytes].

        Args:
            values: returns the numbers of a segment by its name, with its dtype and shape.
        """
        record = torch.zeros(self.size_bytes, dtype=torch.uint8)
        for segment in self.segments:
            part = values(segment.name)
            assert part.shape == segment.shape and part.dtype == _DTYPES[segment.dtype]
            raw = part.contiguous().view(-1).view(torch.uint8)
            record[segment.offset : segment.offset + segment.n_bytes] = raw
        return record

    def views(self, record: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return views of all segments of a record by name."""
        return {segment.name: segment.view(record) for segment in self.segments}

    def require_finite(self, record: torch.Tensor, *, names: Callable[[str], bool]) -> None:
        """Refuse NaN and infinity among a record's float16 numbers: a forged hash can be right.

        Args:
            names: whether a segment of this name is checked.

        Raises:
            CorruptArtifactError: names the segment.
        """
        for segment in self.segments:
            if names(segment.name) and not are_finite(segment.view(record)):
                raise CorruptArtifactError(f"{segment.name} holds NaN or infinity", hint=REPACK)


def lay_out(parts: Sequence[tuple[str, str, tuple[int, ...]]]) -> RecordLayout:
    """Return the layout of consecutive parts, given by name, dtype and shape."""
    segments: list[Segment] = []
    for name, kind, shape in parts:
        n_bytes = math.prod(shape) * _DTYPES[kind].itemsize
        offset = segments[-1].offset + segments[-1].size_bytes if segments else 0
        padded = -(-n_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        segments.append(
            Segment(
                name=name,
                offset=offset,
                size_bytes=padded,
                n_bytes=n_bytes,
                dtype=kind,
                shape=shape,
            )
        )
    return RecordLayout(
        segments=tuple(segments), size_bytes=segments[-1].offset + segments[-1].size_bytes
    )
