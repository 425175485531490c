"""Record of a channel selector, which stays in memory.

Segments: the integer matrix `selector`; `thresholds`, float16, one for every sparsity of GRID;
`hashes`, the xxh3-64 of every chunk, little-endian; and the expert's vectors unchanged."""

from dataclasses import dataclass

import numpy as np
import torch

from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.artifacts.precision import ChannelPrecision
from moe_tool.errors import CorruptArtifactError
from moe_tool.formats.channel_form import channel_extents
from moe_tool.formats.integer_parts import integer_parts, is_factor, join_integer_parts
from moe_tool.formats.record_layout import REPACK, RecordLayout, lay_out
from moe_tool.quantization.channels import GRID, Selector
from moe_tool.quantization.weights import FloatWeight

_SELECTOR = "selector"
_HASH_BYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectorForm:
    """Channel selectors of one precision."""

    precision: ChannelPrecision
    n_channels: int
    n_hidden: int
    vectors: tuple[str, ...]
    """Names of the expert's vectors"""
    layout: RecordLayout

    @classmethod
    def of(cls, shape: MoeShape, precision: ChannelPrecision) -> "SelectorForm":
        """Return the form of the selectors of a model's experts.

        Raises:
            CorruptArtifactError: the model's experts have no channels.
        """
        n_channels, n_hidden = channel_extents(shape)
        vectors = [tensor for tensor in shape.expert_tensors if len(tensor.shape) == 1]
        parts = integer_parts(_SELECTOR, n_channels, n_hidden, precision.selector)
        layout = lay_out(
            [
                *((part.name, part.dtype, part.shape) for part in parts),
                ("thresholds", "float16", (len(GRID),)),
                ("hashes", "uint8", (n_channels * _HASH_BYTES,)),
                *((vector.name, shape.dtype, vector.shape) for vector in vectors),
            ]
        )
        return cls(
            precision=precision,
            n_channels=n_channels,
            n_hidden=n_hidden,
            vectors=tuple(vector.name for vector in vectors),
            layout=layout,
        )

    def encode(self, content: Selector) -> torch.Tensor:
        """Return a selector's record, uint8 [layout.size_bytes]."""
        whole = {
            "thresholds": torch.from_numpy(content.thresholds).half(),
            "hashes": torch.from_numpy(content.hashes.astype("<u8").view(np.uint8)),
            **{name: bias.values for name, bias in content.biases.items()},
        }

        def values(segment: str) -> torch.Tensor:
            _, _, part = segment.partition(".")
            return content.weight.part(part) if part else whole[segment]

        return self.layout.fill(values)

    def decode(self, record: torch.Tensor) -> Selector:
        """Return a selector whose matrix is a view into `record`.

        Raises:
            CorruptArtifactError: its thresholds do not ascend from 0.
        """
        views = self.layout.views(record)
        thresholds = views["thresholds"].float().numpy()
        if thresholds[0] != 0 or not (np.diff(thresholds) >= 0).all():
            raise CorruptArtifactError("thresholds do not ascend from 0", hint=REPACK)
        return Selector(
            weight=join_integer_parts(
                _SELECTOR,
                self.n_channels,
                self.n_hidden,
                self.precision.selector,
                views.__getitem__,
            ),
            is_gate=self.precision.selected_by == "gate",
            thresholds=thresholds,
            hashes=views["hashes"].numpy().view("<u8"),
            biases={name: FloatWeight(values=views[name]) for name in self.vectors},
        )

    def require_finite(self, record: torch.Tensor) -> None:
        """Refuse scales, zero points or thresholds that are NaN or infinite, and thresholds that
        do not ascend.

        Raises:
            CorruptArtifactError: names the segment.
        """
        self.layout.require_finite(
            record, names=lambda name: is_factor(name) or name == "thresholds"
        )
        self.decode(record)
