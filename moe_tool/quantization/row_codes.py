"""Rows of a lookup table as bytes: floats as they are, int8, or NF4, with a scale for each block.

A quantized row is its codes, then a float32 scale for each block of 64 values; the last block may
be shorter. NF4 has the sixteen levels of bitsandbytes and its order of nibbles, the first value
high, but scales are not quantized again.
"""

import math
from dataclasses import dataclass

import torch

from moe_tool.artifacts.lookup_manifest import RowForm
from moe_tool.quantization.kept_codes import TABLES

BLOCK = 64
"""Values that share a scale"""
_FLOATS: dict[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_MOST_INT8 = 127


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCodes:
    """Form of the rows of one table."""

    form: RowForm
    width: int
    """Number of values in a row"""

    @property
    def n_blocks(self) -> int:
        """Number of scales in a quantized row"""
        return math.ceil(self.width / BLOCK)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row"""
        if self.form in _FLOATS:
            return self.width * _FLOATS[self.form].itemsize
        return self._code_bytes + 4 * self.n_blocks

    @property
    def _code_bytes(self) -> int:
        return self.width if self.form == "int8" else math.ceil(self.width / 2)

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows as bytes, [n, row_bytes] uint8, of finite float32 [n, width].

        Raises:
            ValueError: a value does not fit into the floats of the form.
        """
        if self.form in _FLOATS:
            narrow = rows.to(_FLOATS[self.form])
            if not torch.isfinite(narrow).all():
                raise ValueError(f"a value does not fit into {self.form}")
            return narrow.contiguous().view(torch.uint8)
        blocks = self._blocks(rows)
        largest = blocks.abs().amax(dim=2)  # [n, blocks]
        scales = largest / _MOST_INT8 if self.form == "int8" else largest
        units = blocks / torch.where(scales > 0, scales, 1.0).unsqueeze(2)
        if self.form == "int8":
            codes = units.round().to(torch.int8).view(torch.uint8).flatten(1)[:, : self.width]
        else:
            codes = _pack_nibbles(_nearest_level(units).flatten(1)[:, : self.width])
        return torch.cat([codes, scales.contiguous().view(torch.uint8)], dim=1)

    def decode(self, raw: torch.Tensor) -> torch.Tensor:
        """Return float32 [n, width] of bytes [n, row_bytes] uint8."""
        if self.form in _FLOATS:
            return raw.view(_FLOATS[self.form]).to(torch.float32)
        codes = raw[:, : self._code_bytes]
        # A copy, since floats have to begin at a multiple of four bytes.
        scales = raw[:, self._code_bytes :].clone(memory_format=torch.contiguous_format)
        if self.form == "int8":
            values = codes.contiguous().view(torch.int8).to(torch.float32)
        else:
            pairs = torch.stack((codes >> 4, codes & 15), dim=2).flatten(1)[:, : self.width]
            values = torch.tensor(TABLES["nf4"])[pairs.to(torch.int32)]
        scaled = self._blocks(values) * scales.view(torch.float32).unsqueeze(2)
        return scaled.flatten(1)[:, : self.width]

    def _blocks(self, values: torch.Tensor) -> torch.Tensor:
        """Return values [n, width] as [n, blocks, BLOCK], the last block filled up with zeros."""
        missing = self.n_blocks * BLOCK - self.width
        return torch.nn.functional.pad(values, (0, missing)).view(-1, self.n_blocks, BLOCK)


def _nearest_level(units: torch.Tensor) -> torch.Tensor:
    """Return the number of the level next to each value of [-1, 1], uint8."""
    levels = torch.tensor(TABLES["nf4"])
    middles = (levels[1:] + levels[:-1]) / 2
    return torch.bucketize(units, middles).to(torch.uint8)


def _pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Return two codes a byte, the first one high: [n, ceil(width / 2)] of [n, width]."""
    even = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return (even[:, ::2] << 4) | even[:, 1::2]
