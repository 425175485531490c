"""How an expert in channels lies in a bundle: its chunks, and a chooser that stays in memory.

The record of channels is one segment, `channels`, uint8 [I, bytes of a chunk]: see
quantization/channels.py. The chooser's record is the matrix that chooses, as any integer matrix is
stored, under the name `chooser`; `thresholds`, float16, one for every sparsity of GRID;
`hashes`, the xxh3-64 of every chunk, little-endian; and the expert's vectors as they are.
"""

from collections.abc import Sequence

import numpy as np
import torch
import xxhash

from moe_tool.artifacts.moe_shape import ExpertTensor, MoeShape
from moe_tool.artifacts.precision import ChannelPrecision
from moe_tool.errors import CorruptArtifactError
from moe_tool.formats.expert_record import RecordLayout, Segment, lay_out, segment_view
from moe_tool.formats.integer_parts import (
    are_finite,
    integer_part,
    integer_parts,
    join_integer_parts,
)
from moe_tool.quantization.channels import (
    GRID,
    ChannelExpert,
    ChannelWeight,
    Chooser,
    row_bytes,
)
from moe_tool.quantization.weights import FloatWeight

FIRST, LAST = "gate_up_proj", "down_proj"
_CHOOSER = "chooser"
_HASH_BYTES = 8


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


def channels_layout(shape: MoeShape, precision: ChannelPrecision) -> RecordLayout:
    """Return the layout of the chunks of an expert that `has_channels`."""
    n_channels, n_hidden = _extents(shape)
    chunk = 2 * row_bytes(n_hidden, precision.width_bits, precision.group)
    return lay_out([("channels", "uint8", (n_channels, chunk))])


def chooser_layout(shape: MoeShape, precision: ChannelPrecision) -> RecordLayout:
    """Return the layout of the chooser of an expert that `has_channels`."""
    n_channels, n_hidden = _extents(shape)
    parts = integer_parts(_CHOOSER, n_channels, n_hidden, precision.chooser)
    return lay_out(
        [
            *((part.name, part.dtype, part.shape) for part in parts),
            ("thresholds", "float16", (len(GRID),)),
            ("hashes", "uint8", (n_channels * _HASH_BYTES,)),
            *((vector.name, shape.dtype, vector.shape) for vector in _vectors(shape)),
        ]
    )


def encode_channels(layout: RecordLayout, weight: ChannelWeight) -> torch.Tensor:
    """Return the record of chunks, uint8 [layout.size_bytes]."""
    record = torch.zeros(layout.size_bytes, dtype=torch.uint8)
    record[: weight.chunks.numel()] = weight.chunks.reshape(-1)
    return record


def encode_chooser(layout: RecordLayout, chooser: Chooser) -> torch.Tensor:
    """Return the chooser's record, uint8 [layout.size_bytes]."""
    record = torch.zeros(layout.size_bytes, dtype=torch.uint8)
    for segment in layout.segments:
        values = _stored(chooser, segment)
        assert values.shape == segment.shape
        raw = values.contiguous().view(-1).view(torch.uint8)
        record[segment.offset : segment.offset + segment.n_bytes] = raw
    return record


def decode_channels(
    layout: RecordLayout, record: torch.Tensor, shape: MoeShape, precision: ChannelPrecision
) -> ChannelExpert:
    """Return an expert, without its chooser, whose chunks are a view into `record`."""
    return ChannelExpert(
        ChannelWeight(
            chunks=segment_view(record, layout.segments[0]),
            width_bits=precision.width_bits,
            group=precision.group,
            n_hidden=_extents(shape)[1],
        )
    )


def decode_chooser(
    layout: RecordLayout, record: torch.Tensor, shape: MoeShape, precision: ChannelPrecision
) -> Chooser:
    """Return a chooser whose matrix is a view into `record`.

    Raises:
        CorruptArtifactError: its thresholds are no sizes in ascending order.
    """
    views = {segment.name: segment_view(record, segment) for segment in layout.segments}
    thresholds = views["thresholds"].float().numpy()
    if thresholds[0] != 0 or not (np.diff(thresholds) >= 0).all():
        raise CorruptArtifactError(
            "thresholds do not ascend from 0", hint="pack the bundle again with moe-tool pack"
        )
    n_channels, n_hidden = _extents(shape)
    return Chooser(
        weight=join_integer_parts(
            _CHOOSER, n_channels, n_hidden, precision.chooser, views.__getitem__
        ),
        is_gate=precision.chosen_by == "gate",
        thresholds=thresholds,
        hashes=views["hashes"].numpy().view("<u8"),
        biases={v.name: FloatWeight(values=views[v.name]) for v in _vectors(shape)},
    )


def chunk_hashes(chunks: torch.Tensor) -> np.ndarray:
    """Return the xxh3-64 of each chunk, uint64 [n], of uint8 [n, bytes]."""
    rows = chunks.numpy()
    return np.fromiter((xxhash.xxh3_64_intdigest(row.data) for row in rows), np.uint64, len(rows))


def require_chunks(weight: ChannelWeight, channels: np.ndarray, hashes: np.ndarray) -> None:
    """Refuse channels that are not those that were packed.

    Args:
        weight: chunks, of which only some are looked at.
        channels: [n] of these.
        hashes: [I] uint64, of all.

    Raises:
        CorruptArtifactError: names the first that is not.
    """
    found = weight.take(torch.from_numpy(channels.astype(np.int64)))
    wrong = np.flatnonzero(chunk_hashes(found.chunks) != hashes[channels])
    if len(wrong):
        raise CorruptArtifactError(
            f"channel {channels[wrong[0]]} is damaged: its hash does not fit",
            hint="pack the bundle again with moe-tool pack",
        )
    require_finite_scales(found)


def require_finite_scales(weight: ChannelWeight) -> None:
    """Refuse channels with NaN or infinity among their scales.

    Raises:
        CorruptArtifactError: there is one.
    """
    if not are_finite(weight.scales().contiguous()):
        raise CorruptArtifactError(
            "channels hold NaN or infinity", hint="pack the bundle again with moe-tool pack"
        )


def _extents(shape: MoeShape) -> tuple[int, int]:
    """(I, H)"""
    last = next(tensor for tensor in shape.expert_tensors if tensor.name == LAST)
    return last.shape[1], last.shape[0]


def _vectors(shape: MoeShape) -> list[ExpertTensor]:
    return [tensor for tensor in shape.expert_tensors if len(tensor.shape) == 1]


def _stored(chooser: Chooser, segment: Segment) -> torch.Tensor:
    name, _, part = segment.name.partition(".")
    if part:
        return integer_part(chooser.weight, part)
    if name == "thresholds":
        return torch.from_numpy(chooser.thresholds).half()
    if name == "hashes":
        return torch.from_numpy(chooser.hashes.astype("<u8").view(np.uint8))
    return chooser.biases[name].values
