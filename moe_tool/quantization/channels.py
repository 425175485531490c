"""A gated expert's channels as chunks that can be used alone (FloE, arXiv:2505.05950).

Channel c of an expert of inner width I is row c of one of its first two matrices, here the other
one, for the one that chooses lies elsewhere, and column c of the last matrix. Its chunk is the
row's codes, the row's scales, the column's codes, the column's scales: both are H numbers with a
float16 scale for every `group` of them, so that nothing of another channel is needed.

Codes are unsigned, a number's code plus 2**(bits - 1), filled up with zeros to a multiple of 32.
Eight bits are a byte each. At four bits 32 codes are 16 bytes: byte i has code i in its low half
and code 16 + i in its high one, so that a register of 16 lanes is filled by one shift.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from moe_tool.quantization.bit_packing import INPUTS, unpack
from moe_tool.quantization.round_to_nearest import wide_scales
from moe_tool.quantization.weights import ExpertWeights, FloatWeight, IntegerWeight

GRID = tuple(step / 20 for step in range(20))
"""Sparsities that thresholds are kept for: 0, 0.05, ... 0.95"""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ChannelWeight:
    """The chunks of one expert's channels."""

    chunks: torch.Tensor
    """uint8 [I, chunk_bytes]"""
    width_bits: int
    """4 or 8"""
    group: int
    n_hidden: int
    """H"""

    @property
    def n_channels(self) -> int:
        """I"""
        return self.chunks.shape[0]

    def scales(self) -> torch.Tensor:
        """Return float16 [I, 2, G]: of row and column; a view."""
        half = row_bytes(self.n_hidden, self.width_bits, self.group)
        n_scales = -(-self.n_hidden // self.group)
        rows = self.chunks.view(self.n_channels, 2, half)
        return rows[:, :, half - 2 * n_scales :].view(torch.float16)

    def take(self, channels: torch.Tensor) -> "ChannelWeight":
        """Return some channels alone, [n] int64; a copy."""
        return ChannelWeight(
            chunks=self.chunks.index_select(0, channels),
            width_bits=self.width_bits,
            group=self.group,
            n_hidden=self.n_hidden,
        )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ChosenChannels:
    """Which channels of an expert one token needs."""

    index: torch.Tensor
    """[n] int32, ascending"""
    values: torch.Tensor
    """[1, n] float32: what the selector, its bias included, makes of the token there"""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Selector:
    """Part of an expert in channels that stays in memory."""

    weight: IntegerWeight
    """[I, H]: the up projection or the gate"""
    is_gate: bool
    thresholds: np.ndarray
    """[GRID] float32: sizes of what `weight` gives below which that share of them lies"""
    hashes: np.ndarray
    """[I] uint64: xxh3-64 of each chunk"""
    biases: Mapping[str, FloatWeight]
    """gate_up_proj_bias [2I] and down_proj_bias [H], where the expert has them"""

    def threshold(self, sparsity: float) -> float:
        """Return the size below which a channel is left out; 0, which leaves out none, for 0.

        Args:
            sparsity: share of channels that is to be left out, 0 to the last of GRID.
        """
        return float(np.interp(sparsity, GRID, self.thresholds))


class ChannelExpert(ExpertWeights):
    """An expert whose channels are used one by one; the dictionary itself stays empty."""

    __slots__ = ("channels", "selector", "chosen")

    def __init__(self, channels: ChannelWeight, selector: Selector | None = None) -> None:
        """Keep the parts.

        Args:
            channels: all of them; those that are not chosen may hold anything.
            selector: None: it is elsewhere, and nothing can be computed yet.
        """
        super().__init__()
        self.channels = channels
        self.selector = selector
        self.chosen: ChosenChannels | None = None
        """Channels to compute; None: every one"""


def row_bytes(n_hidden: int, width_bits: int, group: int) -> int:
    """Return the bytes of H codes and their scales; a chunk has twice as many."""
    return -(-n_hidden // INPUTS) * INPUTS * width_bits // 8 + 2 * -(-n_hidden // group)


def pack_channels(row: IntegerWeight, column: IntegerWeight) -> ChannelWeight:
    """Return chunks of two matrices [I, H] of the same width and group, without zero points.

    Args:
        row: whose row c belongs to channel c.
        column: the last matrix transposed.
    """
    assert row.shape == column.shape and row.zeros is None and column.zeros is None
    assert (row.width_bits, row.group) == (column.width_bits, column.group)
    chunks = torch.cat([_pack_rows(row), _pack_rows(column)], dim=1)
    return ChannelWeight(
        chunks=chunks, width_bits=row.width_bits, group=row.group, n_hidden=row.n_inputs
    )


def dequantize_channels(weight: ChannelWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows and columns, float32 [I, H] each."""
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
    """uint8 [I, row_bytes]"""
    n_rows, n_inputs = weight.shape
    codes = unpack(weight.planes, weight.width_bits, n_outputs=n_rows, n_inputs=n_inputs)
    codes = F.pad(codes, (0, -n_inputs % INPUTS)).contiguous()
    if weight.width_bits == 4:
        blocks = codes.view(n_rows, -1, 2, INPUTS // 2)
        codes = (blocks[:, :, 0] | blocks[:, :, 1] << 4).reshape(n_rows, -1)
    scales = weight.scales.transpose(1, 2).reshape(-1, weight.scales.shape[1])[:n_rows]
    return torch.cat([codes, scales.contiguous().view(torch.uint8)], dim=1)
