"""A matrix of codes taken apart, so that single codes can move."""

from dataclasses import dataclass, replace

import torch

from moe_tool.quantization.bit_packing import pack, unpack
from moe_tool.quantization.round_to_nearest import dequantize
from moe_tool.quantization.weights import IntegerWeight

_NEAREST = 0.9
"""Share of the codes that are nearest to what they stand for where rounding chose them; scales that
were fitted afterwards move a few"""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class CodeMatrix:
    """weight[o, i] = slope * code[o, i] + start, with slope and start of output o and of the group
    of input i."""

    codes: torch.Tensor
    """uint8 [out, in]"""
    slope: torch.Tensor
    """[out, G] float32; may be negative, or zero"""
    start: torch.Tensor
    """[out, G] float32"""
    stored: IntegerWeight
    """The matrix that it was taken from"""

    def values(self) -> torch.Tensor:
        """Return the weights, float32 [out, in]."""
        return self._wide(self.start).addcmul_(self.codes, self._wide(self.slope))

    def by_codes(self, by_weights: torch.Tensor) -> torch.Tensor:
        """Return a gradient by the codes from one by the weights, which is overwritten; [out, in]
        float32."""
        return by_weights.mul_(self._wide(self.slope))

    def residual(self, exact: torch.Tensor) -> torch.Tensor | None:
        """Return what rounding has lost of a matrix, in codes: up to half a step either way, zero
        where the grid has no steps. None where the codes were not chosen by rounding to nearest:
        each makes up for others then, and what one of them is off by was not lost.

        Args:
            exact: [out, in], any float dtype: what the codes were made from.
        """
        slope = self._wide(self.slope)
        wanted = (exact.float() - self._wide(self.start)).div_(slope)
        wanted = torch.where(slope == 0, self.codes, wanted)
        nearest = wanted.round().clamp_(0, 2**self.stored.width_bits - 1)
        if int((nearest == self.codes).sum()) < _NEAREST * nearest.numel():
            return None
        return wanted.sub_(self.codes).clamp_(-0.5, 0.5)

    def pack(self) -> IntegerWeight:
        """Return the matrix as a record holds it, with the scales that it had."""
        return replace(self.stored, planes=pack(self.codes, self.stored.width_bits))

    def _wide(self, per_group: torch.Tensor) -> torch.Tensor:
        group, n_inputs = self.stored.group, self.stored.n_inputs
        return per_group.repeat_interleave(group, dim=1)[:, :n_inputs]


def take_apart(weight: IntegerWeight) -> CodeMatrix:
    """Return a matrix with its codes unpacked; `weight` may be overwritten afterwards.

    What a code stands for is asked of `dequantize`: the matrix of all zeros and that of all ones.
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
