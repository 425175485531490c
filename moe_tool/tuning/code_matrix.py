"""Matrix with unpacked codes, so that single codes can change."""

from dataclasses import dataclass, replace

import torch

from moe_tool.quantization.bit_packing import pack, unpack
from moe_tool.quantization.round_to_nearest import dequantize
from moe_tool.quantization.weights import IntegerWeight

_NEAREST = 0.9
"""Minimum share of codes nearest to the exact weights if rounding to nearest chose them; scales
fitted later change a few"""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class CodeMatrix:
    """Unpacked codes: weight[o, i] = slope * code[o, i] + start, with slope and start by output o
    and group of input i."""

    codes: torch.Tensor
    """Codes, uint8 [out, in]"""
    slope: torch.Tensor
    """[out, G] float32 grid steps; may be negative or zero"""
    start: torch.Tensor
    """[out, G] float32 weight of code 0"""
    stored: IntegerWeight
    """Packed matrix that the codes were taken from, without planes"""

    def values(self) -> torch.Tensor:
        """Return the weights, float32 [out, in]."""
        return self._wide(self.start).addcmul_(self.codes, self._wide(self.slope))

    def by_codes(self, by_weights: torch.Tensor) -> torch.Tensor:
        """Convert a gradient by the weights, [out, in] float32, to one by the codes, in place."""
        return by_weights.mul_(self._wide(self.slope))

    def residual(self, exact: torch.Tensor) -> torch.Tensor | None:
        """Return the rounding error in grid steps, -0.5 to 0.5, zero where the step is zero.

        None if the codes were not rounded to nearest: then they compensate each other, and their
        single errors are no loss.

        Args:
            exact: [out, in], any float dtype, weights that the codes were made from.
        """
        slope = self._wide(self.slope)
        wanted = (exact.float() - self._wide(self.start)).div_(slope)
        wanted = torch.where(slope == 0, self.codes, wanted)
        nearest = wanted.round().clamp_(0, 2**self.stored.width_bits - 1)
        if int((nearest == self.codes).sum()) < _NEAREST * nearest.numel():
            return None
        return wanted.sub_(self.codes).clamp_(-0.5, 0.5)

    def pack(self) -> IntegerWeight:
        """Return the packed matrix with its original scales."""
        return replace(self.stored, planes=pack(self.codes, self.stored.width_bits))

    def _wide(self, per_group: torch.Tensor) -> torch.Tensor:
        group, n_inputs = self.stored.group, self.stored.n_inputs
        return per_group.repeat_interleave(group, dim=1)[:, :n_inputs]


def take_apart(weight: IntegerWeight) -> CodeMatrix:
    """Return a matrix with its codes unpacked; `weight` may be overwritten afterwards.

    Slope and start come from dequantizing a matrix of all zeros and one of all ones.
    """
    n_out, n_in = weight.shape
    codes = unpack(weight.planes, weight.width_bits, n_outputs=n_out, n_inputs=n_in)

    def stands_for(code: int) -> torch.Tensor:
        planes = pack(torch.full_like(codes, code), weight.width_bits)
        return dequantize(replace(weight, planes=planes))[:, :: weight.group]  # [out, G]

    start = stands_for(0).clone()
    return CodeMatrix(
        codes=codes.clone(),
        slope=stands_for(1) - start,
        start=start,
        stored=replace(
            weight,
            planes=(),
            scales=weight.scales.clone(),
            zeros=None if weight.zeros is None else weight.zeros.clone(),
        ),
    )
