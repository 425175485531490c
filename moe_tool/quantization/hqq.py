"""Half-quadratic quantization (HQQ): scales with zero points robust to outliers, without data.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023). The grid
spans a group's smallest to largest weight; its zero point is then moved to lower the sum of
|error|^p, p < 1, which weighs outliers little. An auxiliary variable, the accepted errors, makes
the problem half-quadratic: shrinkage finds the accepted errors and a mean the zero point, in turns.
"""

import torch

from moe_tool.quantization.bit_packing import pack
from moe_tool.quantization.round_to_nearest import GROUP, not_finite, tile_rows
from moe_tool.quantization.weights import IntegerWeight

_NORM = 0.7
"""Exponent p of the error"""
_TURNS = 20
_STRICTER = 1.05
"""Growth of the penalty on accepted errors per turn"""
_LARGEST_ZERO = 1024.0
"""Largest zero point in steps; weights close together and far from zero get coarser steps"""


def quantize_hqq(weight: torch.Tensor, width_bits: int, *, group: int = GROUP) -> IntegerWeight:
    """Return the codes, scales and zero points of a matrix.

    Args:
        weight: [out, in], any float dtype.
        width_bits: 1 to 8.
        group: inputs per scale, a multiple of 32; the last group of a row may be short.

    Raises:
        CorruptArtifactError: the matrix holds NaN or infinity.
    """
    n_out, n_in = weight.shape
    n_groups = -(-n_in // group)
    values = weight.float()
    if not bool(torch.isfinite(values).all()):
        raise not_finite()
    # A row's last weight pads its last group, which changes no extreme.
    short = n_groups * group - n_in
    if short:
        values = torch.cat([values, values[:, -1:].expand(n_out, short)], dim=1)
    values = values.view(n_out, n_groups, group)
    highest_code = 2**width_bits - 1
    lowest, highest = values.aminmax(dim=-1, keepdim=True)
    size = torch.maximum(-lowest, highest)
    steps = torch.maximum((highest - lowest) / highest_code, size / _LARGEST_ZERO)
    steps = torch.where(steps < 1e-7, 1.0, steps).clamp_max(65504.0).half().float()
    zeros = _moved_zeros(values, steps, -lowest / steps, highest_code)
    codes = (values / steps + zeros).round_().clamp_(0, highest_code)
    return IntegerWeight(
        planes=pack(codes.flatten(1)[:, :n_in].to(torch.uint8), width_bits),
        scales=tile_rows(steps.squeeze(-1).half()),
        zeros=tile_rows(zeros.squeeze(-1).half()),
        width_bits=width_bits,
        group=group,
        n_outputs=n_out,
        n_inputs=n_in,
    )


def _moved_zeros(
    values: torch.Tensor, steps: torch.Tensor, zeros: torch.Tensor, highest_code: int
) -> torch.Tensor:
    """Return the zero points, [out, G, 1] float32, exact in float16."""
    unit = values.abs().mean(dim=-1, keepdim=True).clamp_min(1e-30)
    penalty = 1.0
    for _ in range(_TURNS):
        codes = (values / steps + zeros).round_().clamp_(0, highest_code)
        error = (values - steps * (codes - zeros)) / unit
        size = error.abs().clamp_min(1e-9)
        accepted = error.sign() * torch.relu(size - _NORM * size ** (_NORM - 1) / penalty) * unit
        zeros = (codes - (values - accepted) / steps).mean(dim=-1, keepdim=True)
        penalty *= _STRICTER
    return zeros.clamp(-_LARGEST_ZERO, _LARGEST_ZERO).half().float()
