"""Half-quadratic quantization (HQQ): zero points robust to outliers, without any data.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023). The grid
runs from the least to the largest weight of a group; its zero point is then moved so that the sum
of |error|^p is small, p < 1, which minds the many small weights and lets outliers go. That is not
quadratic, but becomes so with a second unknown, the errors that are accepted: these by shrinkage,
the zero point by a mean, in turns.
"""

import torch

from moe_tool.errors import CorruptArtifactError
from moe_tool.quantization.bit_packing import pack
from moe_tool.quantization.round_to_nearest import GROUP, tile_rows
from moe_tool.quantization.weights import IntegerWeight

_NORM = 0.7
"""p"""
_TURNS = 20
_STRICTER = 1.05
"""Factor by which a turn's penalty grows: errors are accepted ever less easily"""
_LARGEST_ZERO = 1024.0
"""Steps at most: a group whose weights lie close together, far from zero, gets coarser ones"""


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
        raise CorruptArtifactError(
            "a weight is NaN or infinite", hint="download the checkpoint again"
        )
    # The last weight of a row again and again fills its last group, and changes no extreme.
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
    """[out, G, 1] float32, numbers of float16."""
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
