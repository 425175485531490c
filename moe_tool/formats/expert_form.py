"""Record of an expert: its matrices in the checkpoint's floats, or as integer codes.

A matrix in floats is one segment of its name; an integer matrix is `NAME.plane0`, `NAME.plane1` ...
and `NAME.scales`, with zero points `NAME.zeros` (quantization/bit_packing.py); a vector is one
segment in the checkpoint's dtype.

With a nested precision the record begins with the record of its base, whose scales are here called
`NAME.base_scales`; the refinement, `NAME.plane1` and `NAME.scales` of every matrix, follows.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from moe_tool.artifacts.moe_shape import ExpertTensor, MoeShape
from moe_tool.artifacts.precision import IntegerPrecision, NativePrecision
from moe_tool.formats.integer_parts import integer_parts, is_factor, join_integer_parts
from moe_tool.formats.record_layout import RecordLayout, lay_out
from moe_tool.quantization.weights import AnyWeight, ExpertWeights, FloatWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeForm:
    """Experts in the checkpoint's floats."""

    layout: RecordLayout

    @classmethod
    def of(cls, shape: MoeShape, precision: NativePrecision) -> "NativeForm":
        """Return the form of a model's experts."""
        return cls(layout=lay_out([(t.name, shape.dtype, t.shape) for t in shape.expert_tensors]))

    def encode(self, content: Mapping[str, AnyWeight]) -> torch.Tensor:
        """Return a record, uint8 [layout.size_bytes]."""
        return self.layout.fill(lambda name: content[name].part(""))

    def decode(self, record: torch.Tensor) -> ExpertWeights:
        """Return an expert whose weights are views into `record`."""
        views = self.layout.views(record)
        return ExpertWeights({name: FloatWeight(values=view) for name, view in views.items()})

    def require_finite(self, record: torch.Tensor) -> None:
        """Accept everything: the checkpoint's numbers are kept as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerForm:
    """Experts as integer codes."""

    precision: IntegerPrecision
    tensors: tuple[ExpertTensor, ...]
    layout: RecordLayout

    @classmethod
    def of(cls, shape: MoeShape, precision: IntegerPrecision) -> "IntegerForm":
        """Return the form of a model's experts."""
        parts: list[tuple[str, str, tuple[int, ...]]] = []
        refinements: list[tuple[str, str, tuple[int, ...]]] = []
        for tensor in shape.expert_tensors:
            if len(tensor.shape) != 2:
                parts.append((tensor.name, shape.dtype, tensor.shape))
                continue
            for part in integer_parts(tensor.name, *tensor.shape, precision):
                into = refinements if part.is_refinement else parts
                into.append((part.name, part.dtype, part.shape))
        layout = lay_out(parts + refinements)
        return cls(precision=precision, tensors=shape.expert_tensors, layout=layout)

    def encode(self, content: Mapping[str, AnyWeight]) -> torch.Tensor:
        """Return a record, uint8 [layout.size_bytes]."""

        def values(segment: str) -> torch.Tensor:
            name, _, part = segment.partition(".")
            return content[name].part(part)

        return self.layout.fill(values)

    def decode(self, record: torch.Tensor) -> ExpertWeights:
        """Return an expert whose weights are views into `record`."""
        views = self.layout.views(record)
        weights = ExpertWeights()
        for tensor in self.tensors:
            if len(tensor.shape) != 2:
                weights[tensor.name] = FloatWeight(values=views[tensor.name])
                continue
            weights[tensor.name] = join_integer_parts(
                tensor.name, *tensor.shape, self.precision, views.__getitem__
            )
        return weights

    def require_finite(self, record: torch.Tensor) -> None:
        """Refuse scales and zero points that are NaN or infinite.

        Raises:
            CorruptArtifactError: names the segment.
        """
        self.layout.require_finite(record, names=is_factor)
