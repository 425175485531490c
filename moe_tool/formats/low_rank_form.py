"""Record of a low-rank map in an expert's place: two matrices and an offset, float16."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.artifacts.precision import LowRankPrecision
from moe_tool.formats.record_layout import RecordLayout, lay_out
from moe_tool.quantization.low_rank import LOW_RANK_TENSORS
from moe_tool.quantization.weights import ExpertWeights, FloatWeight, IntegerWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankForm:
    """Low-rank maps of one rank."""

    layout: RecordLayout

    @classmethod
    def of(cls, shape: MoeShape, precision: LowRankPrecision) -> "LowRankForm":
        """Return the form of the maps for a model's experts."""
        sizes = {"rank": precision.rank, "hidden": shape.expert_hidden}
        parts = [
            (name, "float16", tuple(sizes[extent] for extent in extents))
            for name, extents in LOW_RANK_TENSORS.items()
        ]
        return cls(layout=lay_out(parts))

    def encode(self, content: Mapping[str, FloatWeight | IntegerWeight]) -> torch.Tensor:
        """Return a record, uint8 [layout.size_bytes]."""
        return self.layout.fill(lambda name: content[name].part(""))

    def decode(self, record: torch.Tensor) -> ExpertWeights:
        """Return a map whose matrices are views into `record`."""
        views = self.layout.views(record)
        return ExpertWeights({name: FloatWeight(values=view) for name, view in views.items()})

    def require_finite(self, record: torch.Tensor) -> None:
        """Refuse a map that holds NaN or infinity.

        Raises:
            CorruptArtifactError: names the segment.
        """
        self.layout.require_finite(record, names=lambda _: True)
