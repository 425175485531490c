"""Round-to-nearest: each weight to the nearest point of a grid that its row's group shares.

The grid of b bits is {-2**(b-1), ..., 2**(b-1) - 1} * d with d chosen so that the weight of largest
magnitude lies exactly on the outermost point: d = w_largest / -2**(b-1), which may be negative. So
all 2**b points are used without storing a zero point. d is rounded to float16 before the codes are
computed, so that codes and stored scale belong together. One bit: d = mean |w|, code = sign.
"""

import torch

from moe_tool.errors import CorruptArtifactError
from moe_tool.quantization.bit_packing import pack, unpack
from moe_tool.quantization.weights import IntegerWeight

GROUP = 64
_FLOAT16_MAX = 65504.0


def quantize(weight: torch.Tensor, width_bits: int, *, group: int = GROUP) -> IntegerWeight:
    """Return the codes and scales of a matrix.

    Args:
        weight: [out, in], any float dtype.
        width_bits: 8 or 4.
        group: inputs per scale; the last group of a row may be short.

    Raises:
        CorruptArtifactError: the matrix holds NaN or infinity.
    """
    codes, scales = _codes(weight, width_bits, group)
    n_out, n_in = weight.shape
    return IntegerWeight(
        codes=pack(codes.flatten(1)[:, :n_in].to(torch.int8), width_bits),
        scales=scales.squeeze(-1),
        width_bits=width_bits,
        group=group,
        n_inputs=n_in,
    )


def dequantize(weight: IntegerWeight) -> torch.Tensor:
    """Return float32 [out, in]."""
    codes = unpack(weight.codes, weight.width_bits, n_inputs=weight.n_inputs)
    scales = weight.scales.float().repeat_interleave(weight.group, dim=1)[:, : weight.n_inputs]
    return codes * scales


def round_trip(weight: torch.Tensor, width_bits: int, *, group: int = GROUP) -> torch.Tensor:
    """Return what is left of a matrix at a width of 1 to 8 bits.

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
    """Codes as float32 [out, G, group] and scales as float16 [out, G, 1]."""
    n_out, n_in = weight.shape
    n_groups = -(-n_in // group)
    values = weight.float()
    if n_in % group:
        values = torch.nn.functional.pad(values, (0, n_groups * group - n_in))
    values = values.reshape(n_out, n_groups, group)
    lowest, highest = values.aminmax(dim=-1, keepdim=True)  # [out, G, 1]
    if not (torch.isfinite(lowest).all() and torch.isfinite(highest).all()):
        raise CorruptArtifactError(
            "a weight is NaN or infinite", hint="download the checkpoint again"
        )
    if width_bits == 1:
        sizes = torch.full((n_groups, 1), group)
        sizes[-1] = n_in - (n_groups - 1) * group
        scales = (values.abs().sum(dim=-1, keepdim=True) / sizes).clamp_(max=_FLOAT16_MAX)
        return torch.where(values < 0, -1.0, 1.0), scales.half()
    half_range = 2 ** (width_bits - 1)
    largest = torch.where(-lowest > highest, lowest, highest)
    scales = (largest / -half_range).clamp_(-_FLOAT16_MAX, _FLOAT16_MAX).half()
    scales += 0.0  # a group of zeros has the scale 0, not -0: same numbers, same bytes
    exact = scales.float()
    inverse = torch.where(exact == 0, 0.0, 1.0 / exact)
    return (values * inverse).round_().clamp_(-half_range, half_range - 1), scales
