"""Record of an expert in channels: its chunks, uint8 [I, bytes of a chunk], as one segment.

quantization/channels.py defines the chunks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xxhash

from moe_tool.artifacts.moe_shape import ExpertTensor, MoeShape
from moe_tool.artifacts.precision import ChannelPrecision
from moe_tool.errors import CorruptArtifactError
from moe_tool.formats.integer_parts import are_finite
from moe_tool.formats.record_layout import REPACK, RecordLayout, lay_out
from moe_tool.quantization.channels import ChannelExpert, ChannelWeight, row_bytes

FIRST, LAST = "gate_up_proj", "down_proj"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelForm:
    """Experts in channels, without their selectors."""

    precision: ChannelPrecision
    n_hidden: int
    layout: RecordLayout

    @classmethod
    def of(cls, shape: MoeShape, precision: ChannelPrecision) -> "ChannelForm":
        """Return the form of a model's experts.

        Raises:
            CorruptArtifactError: the model's experts have no channels.
        """
        n_channels, n_hidden = channel_extents(shape)
        chunk = 2 * row_bytes(n_hidden, precision.width_bits, precision.group)
        layout = lay_out([("channels", "uint8", (n_channels, chunk))])
        return cls(precision=precision, n_hidden=n_hidden, layout=layout)

    def encode(self, content: ChannelExpert) -> torch.Tensor:
        """Return the record of an expert's chunks, uint8 [layout.size_bytes]."""
        return self.layout.fill(lambda _: content.channels.chunks)

    def decode(self, record: torch.Tensor) -> ChannelExpert:
        """Return an expert, without its selector, whose chunks are a view into `record`."""
        return ChannelExpert(
            ChannelWeight(
                chunks=self.layout.segments[0].view(record),
                width_bits=self.precision.width_bits,
                group=self.precision.group,
                n_hidden=self.n_hidden,
            )
        )

    def require_finite(self, record: torch.Tensor) -> None:
        """Refuse channels with NaN or infinity among their scales.

        Raises:
            CorruptArtifactError: there is one.
        """
        _require_finite_scales(self.decode(record).channels)


def has_channels(tensors: Sequence[ExpertTensor]) -> bool:
    """Return whether an expert of these tensors has channels: a joined gate and up projection and
    one behind them."""
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    first, last = shapes.get(FIRST, ()), shapes.get(LAST, ())
    others = shapes.keys() - {FIRST, LAST, f"{FIRST}_bias", f"{LAST}_bias"}
    return (
        not others
        and len(first) == len(last) == 2
        and first == (2 * last[1], last[0])
        and shapes.get(f"{FIRST}_bias", (first[0],)) == (first[0],)
        and shapes.get(f"{LAST}_bias", (last[0],)) == (last[0],)
    )


def channel_extents(shape: MoeShape) -> tuple[int, int]:
    """Return (I, H) of a model's experts.

    Raises:
        CorruptArtifactError: they have no channels.
    """
    if not has_channels(shape.expert_tensors):
        raise CorruptArtifactError(
            "channels of experts that have no joined gate and up projection", hint=REPACK
        )
    last = next(tensor for tensor in shape.expert_tensors if tensor.name == LAST)
    return last.shape[1], last.shape[0]


def chunk_hashes(chunks: torch.Tensor) -> np.ndarray:
    """Return the xxh3-64 of each chunk, uint64 [n], of uint8 [n, bytes]."""
    rows = chunks.numpy()
    return np.fromiter((xxhash.xxh3_64_intdigest(row.data) for row in rows), np.uint64, len(rows))


def require_chunks(weight: ChannelWeight, channels: np.ndarray, hashes: np.ndarray) -> None:
    """Refuse channels that differ from the packed ones.

    Args:
        channels: [n] channels to check.
        hashes: [I] uint64 hashes of all chunks.

    Raises:
        CorruptArtifactError: names the first channel that differs.
    """
    found = weight.take(torch.from_numpy(channels.astype(np.int64)))
    wrong = np.flatnonzero(chunk_hashes(found.chunks) != hashes[channels])
    if len(wrong):
        raise CorruptArtifactError(
            f"channel {channels[wrong[0]]} is damaged: its hash does not fit", hint=REPACK
        )
    _require_finite_scales(found)


def _require_finite_scales(weight: ChannelWeight) -> None:
    if not are_finite(weight.scales().contiguous()):
        raise CorruptArtifactError("channels hold NaN or infinity", hint=REPACK)
