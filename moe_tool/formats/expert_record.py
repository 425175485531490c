"""How one expert lies in a bundle: named, aligned segments, so that it is one aligned read.

A matrix in the checkpoint's floats is one segment of its name; an integer matrix is `NAME.plane0`,
`NAME.plane1` ... and `NAME.scales`, with zero points `NAME.zeros` (quantization/bit_packing.py); a
vector is one segment in the checkpoint's dtype. Every segment is padded with
zeros to ALIGNMENT_BYTES. Little-endian throughout.

Of a nested precision the record begins with the record of its base, whose scales are here called
`NAME.base_scales`; what refines it, `NAME.plane1` and `NAME.scales` of every matrix, follows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from moe_tool.artifacts.bundle_manifest import ALIGNMENT_BYTES
from moe_tool.artifacts.moe_shape import ExpertTensor, FloatName
from moe_tool.artifacts.precision import IntegerPrecision, Precision
from moe_tool.errors import CorruptArtifactError
from moe_tool.formats.integer_parts import (
    are_finite,
    integer_part,
    integer_parts,
    join_integer_parts,
)
from moe_tool.quantization.nested import with_base
from moe_tool.quantization.round_to_nearest import quantize
from moe_tool.quantization.weights import ExpertWeights, FloatWeight, IntegerWeight

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "uint8": torch.uint8,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One part of a record."""

    name: str
    offset: int
    """From the start of the record, a multiple of ALIGNMENT_BYTES"""
    size_bytes: int
    """With padding, a multiple of ALIGNMENT_BYTES"""
    n_bytes: int
    """Without padding"""
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordLayout:
    """The segments of every record of a bundle."""

    segments: tuple[Segment, ...]
    size_bytes: int
    """Of a record, padding included"""


def record_layout(
    tensors: Sequence[ExpertTensor], dtype: FloatName, precision: Precision
) -> RecordLayout:
    """Return the layout that follows from an expert's tensors and their precision.

    Args:
        tensors: of one expert, canonical.
        dtype: of the checkpoint.
        precision: of matrices; vectors stay in `dtype`.
    """
    return lay_out(_parts(tensors, dtype, precision))


def lay_out(parts: Sequence[tuple[str, str, tuple[int, ...]]]) -> RecordLayout:
    """Return the layout of parts that follow each other.

    Args:
        parts: name, dtype and shape of each.
    """
    segments: list[Segment] = []
    for name, kind, shape in parts:
        n_bytes = _DTYPES[kind].itemsize
        for extent in shape:
            n_bytes *= extent
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


QuantizeExpert = Callable[
    [Mapping[str, torch.Tensor], IntegerPrecision], Mapping[str, IntegerWeight]
]
"""(an expert's tensors, how) -> the codes of its matrices"""


class RoundMatrix(Protocol):
    """Rounds a matrix to nearest as `quantize` does."""

    def __call__(self, weight: torch.Tensor, width_bits: int, *, group: int) -> IntegerWeight:
        """Return its codes and scales."""


def nearest(
    weights: Mapping[str, torch.Tensor],
    precision: IntegerPrecision,
    *,
    round_matrix: RoundMatrix = quantize,
) -> dict[str, IntegerWeight]:
    """Round every matrix to nearest, with `quantize` or what does the same faster."""
    assert not precision.zeros
    found = {
        name: round_matrix(weight, precision.width_bits, group=precision.group)
        for name, weight in weights.items()
        if weight.dim() == 2
    }
    if precision.base_bits is None:
        return found
    return {name: with_base(weights[name], coded) for name, coded in found.items()}


def encode_record(
    layout: RecordLayout,
    weights: Mapping[str, torch.Tensor],
    precision: Precision,
    *,
    quantize_expert: QuantizeExpert = nearest,
) -> torch.Tensor:
    """Return a record: uint8 [layout.size_bytes].

    Args:
        layout: of this expert's tensors and precision.
        weights: the expert in canonical form, in the checkpoint's dtype.
        quantize_expert: where the precision has codes.

    Raises:
        CorruptArtifactError: a weight to be quantized is NaN or infinite.
    """
    record = torch.zeros(layout.size_bytes, dtype=torch.uint8)
    quantized: Mapping[str, IntegerWeight] = {}
    if isinstance(precision, IntegerPrecision):
        quantized = quantize_expert(weights, precision)
    for segment in layout.segments:
        name, _, part = segment.name.partition(".")
        values = integer_part(quantized[name], part) if part else weights[name]
        assert values.shape == segment.shape and values.dtype == _DTYPES[segment.dtype]
        raw = values.contiguous().view(-1).view(torch.uint8)
        record[segment.offset : segment.offset + segment.n_bytes] = raw
    return record


def decode_record(
    layout: RecordLayout,
    record: torch.Tensor,
    precision: Precision,
    tensors: Sequence[ExpertTensor],
) -> ExpertWeights:
    """Return an expert whose weights are views into `record`; nothing is copied.

    Args:
        record: uint8 [layout.size_bytes].
        tensors: the expert's tensors, in the order that the layout was made from.
    """
    views = {segment.name: segment_view(record, segment) for segment in layout.segments}
    weights = ExpertWeights()
    for tensor in tensors:
        if tensor.name in views:
            weights[tensor.name] = FloatWeight(values=views[tensor.name])
            continue
        assert isinstance(precision, IntegerPrecision)
        n_outputs, n_inputs = tensor.shape
        weights[tensor.name] = join_integer_parts(
            tensor.name, n_outputs, n_inputs, precision, views.__getitem__
        )
    return weights


def require_finite_segments(
    layout: RecordLayout, record: torch.Tensor, *, names: Callable[[str], bool]
) -> None:
    """Refuse a record with float16 numbers that are NaN or infinite: its hash can be right all the
    same.

    Args:
        layout: of the record.
        record: uint8 [layout.size_bytes].
        names: which segments are looked at.

    Raises:
        CorruptArtifactError: names the segment.
    """
    for segment in layout.segments:
        if names(segment.name) and not are_finite(segment_view(record, segment)):
            raise CorruptArtifactError(
                f"{segment.name} holds NaN or infinity", hint="pack the bundle again"
            )


def _parts(
    tensors: Sequence[ExpertTensor], dtype: FloatName, precision: Precision
) -> list[tuple[str, str, tuple[int, ...]]]:
    parts: list[tuple[str, str, tuple[int, ...]]] = []
    refinements: list[tuple[str, str, tuple[int, ...]]] = []
    for tensor in tensors:
        if isinstance(precision, IntegerPrecision) and len(tensor.shape) == 2:
            n_outputs, n_inputs = tensor.shape
            for part in integer_parts(tensor.name, n_outputs, n_inputs, precision):
                into = refinements if part.is_refinement else parts
                into.append((part.name, part.dtype, part.shape))
        else:
            parts.append((tensor.name, dtype, tensor.shape))
    return parts + refinements


def segment_view(record: torch.Tensor, segment: Segment) -> torch.Tensor:
    """Return one segment of a record, uint8 [layout.size_bytes], as what it is; a view."""
    raw = record[segment.offset : segment.offset + segment.n_bytes]
    return raw.view(_DTYPES[segment.dtype]).view(segment.shape)
