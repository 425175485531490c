"""Record of a whole expert, or of a low-rank map in its place: tensors in floats, or integer codes.

A matrix in floats is one segment of its name; an integer matrix is `NAME.plane0`, `NAME.plane1` ...
and `NAME.scales`, with zero points `NAME.zeros` (quantization/bit_packing.py); a vector is one
segment in the checkpoint's dtype. A map is two matrices and an offset, float16.

With a nested precision the record begins with the record of its base, whose scales are here called
`NAME.base_scales`; the refinement, `NAME.plane1` and `NAME.scales` of every matrix, follows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.artifacts.precision import IntegerPrecision, LowRankPrecision, NativePrecision
from moe_tool.formats.integer_parts import integer_parts, is_factor, join_integer_parts
from moe_tool.formats.record_layout import RecordLayout, lay_out
from moe_tool.quantization.low_rank import LOW_RANK_TENSORS
from moe_tool.quantization.weights import AnyWeight, ExpertWeights, FloatWeight

_Part = tuple[str, str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorForm:
    """Tensors by name."""

    layout: RecordLayout
    shapes: Mapping[str, tuple[int, ...]]
    """Shape of each tensor"""
    precision: IntegerPrecision | None
    """Precision of the matrices; None: floats"""
    has_to_be_finite: Callable[[str], bool] = is_factor
    """Whether the segment of a name is checked; the checkpoint's own numbers are not"""

    def encode(self, content: Mapping[str, AnyWeight]) -> torch.Tensor:
        """Return a record, uint8 [layout.size_bytes]."""
        return fill_by_name(self.layout, content)

    def decode(self, record: torch.Tensor) -> ExpertWeights:
        """Return the tensors as views into `record`."""
        views = self.layout.views(record)
        weights = ExpertWeights()
        for name, shape in self.shapes.items():
            if self.precision is None or len(shape) != 2:
                weights[name] = FloatWeight(values=views[name])
            else:
                weights[name] = join_integer_parts(name, *shape, self.precision, views.__getitem__)
        return weights

    def require_finite(self, record: torch.Tensor) -> None:
        """Refuse NaN and infinity in scales and zero points, or in a map.

        Raises:
            CorruptArtifactError: names the segment.
        """
        self.layout.require_finite(record, names=self.has_to_be_finite)


def fill_by_name(layout: RecordLayout, content: Mapping[str, AnyWeight]) -> torch.Tensor:
    """Return the record of weights whose segments are called NAME or NAME.PART."""

    def values(segment: str) -> torch.Tensor:
        name, _, part = segment.partition(".")
        return content[name].part(part)

    return layout.fill(values)


def expert_form(shape: MoeShape, precision: NativePrecision | IntegerPrecision) -> TensorForm:
    """Return the form of a model's experts in floats or as integer codes."""
    integer = precision if precision.kind == "integer" else None
    parts: list[_Part] = []
    refinements: list[_Part] = []
    for tensor in shape.expert_tensors:
        if integer is None or len(tensor.shape) != 2:
            parts.append((tensor.name, shape.dtype, tensor.shape))
            continue
        for part in integer_parts(tensor.name, *tensor.shape, integer):
            into = refinements if part.is_refinement else parts
            into.append((part.name, part.dtype, part.shape))
    return TensorForm(
        layout=lay_out(parts + refinements),
        shapes={tensor.name: tensor.shape for tensor in shape.expert_tensors},
        precision=integer,
    )


def low_rank_form(shape: MoeShape, precision: LowRankPrecision) -> TensorForm:
    """Return the form of the low-rank maps for a model's experts."""
    sizes = {"rank": precision.rank, "hidden": shape.expert_hidden}
    shapes = {name: tuple(map(sizes.__getitem__, at)) for name, at in LOW_RANK_TENSORS.items()}
    return TensorForm(
        layout=lay_out([(name, "float16", extents) for name, extents in shapes.items()]),
        shapes=shapes,
        precision=None,
        has_to_be_finite=lambda _: True,
    )
