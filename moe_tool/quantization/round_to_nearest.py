"""Round-to-nearest: each weight becomes the nearest point of its group's grid.

The grid of b bits is {-2**(b-1), ..., 2**(b-1) - 1} * d. d = w_largest / -2**(b-1), which may be
negative, puts the weight of largest magnitude on the outermost point, so that all 2**b points are
used without a zero point. d is rounded to float16 before the codes are computed. One bit:
d = mean |w|, code = sign.
"""

import torch

from moe_tool.errors import CorruptArtifactError
from moe_tool.quantization.bit_packing import ROWS, n_row_blocks, pack, unpack
from moe_tool.quantization.weights import IntegerWeight

GROUP = 64
"""Default number of inputs that share a scale."""
_FLOAT16_MAX = 65504.0


def quantize(weight: torch.Tensor, width_bits: int, *, group: int = GROUP) -> IntegerWeight:
    """Return the codes and scales of a matrix.

    Args:
        weight: [out, in], any float dtype.
        width_bits: 1 to 8.
        group: inputs per scale, a multiple of 32; the last group of a row may be short.

    Raises:
        CorruptArtifactError: the matrix holds NaN or infinity.
    """
    codes, scales = _codes(weight, width_bits, group)
    n_in = weight.shape[1]
    return from_codes(codes.flatten(1)[:, :n_in], scales.squeeze(-1), width_bits, group=group)


def from_codes(
    codes: torch.Tensor, scales: torch.Tensor, width_bits: int, *, group: int
) -> IntegerWeight:
    """Return the matrix of codes times scales.

    Args:
        codes: [out, in] float32 points of the grid; overwritten.
        scales: [out, G] float16.
        width_bits: 1 to 8.
    """
    n_out, n_in = codes.shape
    # One bit: -1 and 1 become 0 and 1; more bits: the range is shifted to begin at 0.
    codes = codes.add_(1).div_(2) if width_bits == 1 else codes.add_(2 ** (width_bits - 1))
    return IntegerWeight(
        planes=pack(codes.to(torch.uint8), width_bits),
        scales=tile_rows(scales),
        width_bits=width_bits,
        group=group,
        n_outputs=n_out,
        n_inputs=n_in,
    )


def grid_scales(weight: torch.Tensor, width_bits: int, *, group: int) -> torch.Tensor:
    """Return the scale of each group's grid, [out, G] float16; see the module docstring.

    Raises:
        CorruptArtifactError: the matrix holds NaN or infinity.
    """
    return _codes(weight, width_bits, group)[1].squeeze(-1)


def scales_of_largest(largest: torch.Tensor, width_bits: int) -> torch.Tensor:
    """Return the scales of grids of 2 bits or more, float16.

    Args:
        largest: float32, each group's weight of largest magnitude.
        width_bits: 2 to 8.
    """
    wide = (largest / -(2 ** (width_bits - 1))).clamp_(-_FLOAT16_MAX, _FLOAT16_MAX)
    scales: torch.Tensor = wide.half()
    scales += 0.0  # turns -0 into 0: same numbers, same bytes
    return scales


def not_finite() -> CorruptArtifactError:
    """Return the error for a matrix with NaN or infinity."""
    return CorruptArtifactError("a weight is NaN or infinite", hint="download the checkpoint again")


def nearest_codes(values: torch.Tensor, scales: torch.Tensor, width_bits: int) -> torch.Tensor:
    """Return the points of the grid nearest to the values, float32.

    Args:
        values: any shape.
        scales: float32, broadcast over `values`; values of scale 0 get the code 0.
        width_bits: 1 to 8.
    """
    if width_bits == 1:
        return torch.where((values < 0) != (scales < 0), -1.0, 1.0)
    half_range = 2 ** (width_bits - 1)
    inverse = torch.where(scales == 0, 0.0, 1.0 / scales)
    return (values * inverse).round_().clamp_(-half_range, half_range - 1)


def wide_scales(scales: torch.Tensor, *, n_inputs: int, group: int) -> torch.Tensor:
    """Return the scale of every weight, float32 [out, n_inputs], from [out, G]."""
    return scales.float().repeat_interleave(group, dim=1)[:, :n_inputs]


def dequantize(weight: IntegerWeight) -> torch.Tensor:
    """Return the weights of the codes, float32 [out, in]."""
    n_out, n_in = weight.shape
    codes = unpack(weight.planes, weight.width_bits, n_outputs=n_out, n_inputs=n_in).float()
    if weight.zeros is not None:
        codes -= _per_input(weight.zeros, weight)
    else:
        codes.mul_(weight.factor).sub_(weight.offset)
    return codes.mul_(_per_input(weight.scales, weight))


def tile_rows(per_row: torch.Tensor) -> torch.Tensor:
    """Return [out, G] as [row blocks, G, 16], padded with zeros."""
    n_out = per_row.shape[0]
    padded = torch.nn.functional.pad(per_row, (0, 0, 0, n_row_blocks(n_out) * ROWS - n_out))
    return padded.view(-1, ROWS, per_row.shape[1]).transpose(1, 2).contiguous()


def _per_input(tiled: torch.Tensor, weight: IntegerWeight) -> torch.Tensor:
    n_out, n_in = weight.shape
    rows = tiled.float().transpose(1, 2).reshape(-1, tiled.shape[1])[:n_out]
    return wide_scales(rows, n_inputs=n_in, group=weight.group)


def round_trip(weight: torch.Tensor, width_bits: int, *, group: int = GROUP) -> torch.Tensor:
    """Return a matrix after rounding to 1 to 8 bits and back.

    Args:
        weight: [out, in], any float dtype.

    Returns:
        float32 [out, in].

    Raises:
        CorruptArtifactError: the matrix holds NaN or infinity.
    """
    codes, scales = _codes(weight, width_bits, group)
    return codes.mul_(scales.float()).flatten(1)[:, : weight.shape[1]]


def _codes(weight: torch.Tensor, width_bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes as float32 [out, G, group] and scales as float16 [out, G, 1]."""
    n_out, n_in = weight.shape
    n_groups = -(-n_in // group)
    values = weight.float()
    if n_in % group:
        values = torch.nn.functional.pad(values, (0, n_groups * group - n_in))
    values = values.reshape(n_out, n_groups, group)
    lowest, highest = values.aminmax(dim=-1, keepdim=True)  # [out, G, 1]
    if not (torch.isfinite(lowest).all() and torch.isfinite(highest).all()):
        raise not_finite()
    if width_bits == 1:
        sizes = torch.full((n_groups, 1), group)
        sizes[-1] = n_in - (n_groups - 1) * group
        scales = (values.abs().sum(dim=-1, keepdim=True) / sizes).clamp_(max=_FLOAT16_MAX)
        return nearest_codes(values, scales, width_bits), scales.half()
    scales = scales_of_largest(torch.where(-lowest > highest, lowest, highest), width_bits)
    return nearest_codes(values, scales.float(), width_bits), scales
