"""Channels of a gated expert as chunks that can be read and used alone (FloE, arXiv:2505.05950).

One of the expert's first two matrices, gate or up, is the selector and stays in memory as a whole.
Channel c of inner width I is row c of the other one and column c of the last matrix. Its chunk is
the row's codes and scales, then the column's codes and scales: H numbers each, with a float16 scale
per `group` numbers, so that no other channel is needed.

Codes are stored as unsigned, code + 2**(bits - 1), padded with zeros to a multiple of 32. At eight
bits a code is a byte. At four bits 32 codes are 16 bytes: byte i has code i in its low half and
code 16 + i in its high half, so that one shift fills a register of 16 lanes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from moe_tool.quantization.bit_packing import INPUTS, unpack
from moe_tool.quantization.round_to_nearest import wide_scales
from moe_tool.quantization.weights import ExpertWeights, FloatWeight, IntegerWeight

GRID = tuple(step / 20 for step in range(20))
"""Sparsities with a stored threshold: 0, 0.05, ... 0.95"""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ChannelWeight:
    """Chunks of one expert's channels."""

    chunks: torch.Tensor
    """uint8 [I, chunk_bytes]: one chunk per channel"""
    width_bits: int
    """Bits per code, 4 or 8"""
    group: int
    n_hidden: int
    """H"""

    @property
    def n_channels(self) -> int:
        """I: inner width of the expert."""
        return self.chunks.shape[0]

    def scales(self) -> torch.Tensor:
        """Return the scales of rows and columns, float16 [I, 2, G]; a view."""
        half = row_bytes(self.n_hidden, self.width_bits, self.group)
        n_scales = -(-self.n_hidden // self.group)
        rows = self.chunks.view(self.n_channels, 2, half)
        return rows[:, :, half - 2 * n_scales :].view(torch.float16)

    def take(self, channels: torch.Tensor) -> "ChannelWeight":
        """Return a copy of the channels with these numbers, [n] int64."""
        return replace(self, chunks=self.chunks.index_select(0, channels))


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ChosenChannels:
    """Channels of an expert that one token needs."""

    index: torch.Tensor
    """[n] int32 channel numbers, ascending"""
    values: torch.Tensor
    """Product of selector and token there, its bias included, [1, n] float32"""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Selector:
    """Part of an expert in channels that stays in memory."""

    weight: IntegerWeight
    """[I, H] matrix: the up projection or the gate"""
    is_gate: bool
    thresholds: np.ndarray
    """[GRID] float32: magnitudes below which that share of the selector's outputs lies"""
    hashes: np.ndarray
    """[I] uint64: xxh3-64 of each chunk"""
    biases: Mapping[str, FloatWeight]
    """Biases gate_up_proj_bias [2I] and down_proj_bias [H], if the expert has them"""

    def threshold(self, sparsity: float) -> float:
        """Return the magnitude below which a channel is skipped; 0 skips none.

        Args:
            sparsity: share of channels to skip, 0 to the last of GRID.
        """
        return float(np.interp(sparsity, GRID, self.thresholds))


class ChannelExpert(ExpertWeights):
    """Expert whose channels are used one by one; the dictionary itself stays empty."""

    __slots__ = ("channels", "selector", "chosen")

    def __init__(self, channels: ChannelWeight, selector: Selector | None = None) -> None:
        """Keep the parts.

        Args:
            channels: all channels; those that are not chosen may hold anything.
            selector: None: not attached yet, so nothing can be computed.
        """
        super().__init__()
        self.channels = channels
        self.selector = selector
        self.chosen: ChosenChannels | None = None
        """Channels to compute; None: every channel"""


def row_bytes(n_hidden: int, width_bits: int, group: int) -> int:
    """Return the bytes of H codes and their scales, half a chunk."""
    return -(-n_hidden // INPUTS) * INPUTS * width_bits // 8 + 2 * -(-n_hidden // group)


def pack_channels(row: IntegerWeight, column: IntegerWeight) -> ChannelWeight:
    """Return the chunks of two matrices [I, H] of equal width and group, without zero points.

    Args:
        row: the matrix whose row c belongs to channel c.
        column: the last matrix, transposed.
    """
    assert row.shape == column.shape and row.zeros is None and column.zeros is None
    assert (row.width_bits, row.group) == (column.width_bits, column.group)
    chunks = torch.cat([_pack_rows(row), _pack_rows(column)], dim=1)
    return ChannelWeight(
        chunks=chunks, width_bits=row.width_bits, group=row.group, n_hidden=row.n_inputs
    )


def dequantize_channels(weight: ChannelWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows and the columns, float32 [I, H] each."""
    rows = weight.chunks.view(2 * weight.n_channels, weight.chunks.shape[1] // 2)
    n_codes = -(-weight.n_hidden // INPUTS) * INPUTS
    packed = rows[:, : n_codes * weight.width_bits // 8]
    if weight.width_bits == 4:
        blocks = packed.reshape(len(rows), n_codes // INPUTS, INPUTS // 2)
        codes = torch.stack([blocks & 15, blocks >> 4], dim=2).reshape(len(rows), n_codes)
    else:
        codes = packed
    values = codes[:, : weight.n_hidden].float().sub_(2 ** (weight.width_bits - 1))
    scales = weight.scales().flatten(0, 1)
    values.mul_(wide_scales(scales, n_inputs=weight.n_hidden, group=weight.group))
    found = values.view(weight.n_channels, 2, weight.n_hidden)
    return found[:, 0], found[:, 1]


def _pack_rows(weight: IntegerWeight) -> torch.Tensor:
    """Return uint8 [I, row_bytes]: codes and scales of each row."""
    n_rows, n_inputs = weight.shape
    codes = unpack(weight.planes, weight.width_bits, n_outputs=n_rows, n_inputs=n_inputs)
    codes = F.pad(codes, (0, -n_inputs % INPUTS)).contiguous()
    if weight.width_bits == 4:
        blocks = codes.view(n_rows, -1, 2, INPUTS // 2)
        codes = (blocks[:, :, 0] | blocks[:, :, 1] << 4).reshape(n_rows, -1)
    scales = weight.scales.transpose(1, 2).reshape(-1, weight.scales.shape[1])[:n_rows]
    return torch.cat([codes, scales.contiguous().view(torch.uint8)], dim=1)
