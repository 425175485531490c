"""Rounding with scales fitted by least squares, weighted by each column's mean squared input.

The weighting is that of the importance matrix of llama.cpp (ggml-quants, `make_qx_quants`). A few
scales around that of a group's largest weight are tried: codes are rounded to nearest, the scale is
then the weighted least-squares one for them, and the pair with the least weighted error is kept.
Deviation: llama.cpp also weights by a function of the weight itself; without it the minimum is the
outputs' error for uncorrelated inputs.
"""

from typing import TYPE_CHECKING

from moe_tool.artifacts.precision import IntegerPrecision
from moe_tool.quantizers.spec import QuantizeExpert, QuantizerSpec

if TYPE_CHECKING:
    import torch

    from moe_tool.quantization.weights import IntegerWeight
    from moe_tool.quantizers.inputs import ExpertInputs

_STEPS = tuple(step / 10 for step in range(-9, 10))
"""Offsets tried for the code of a group's largest weight, from the outermost code"""
_FLOAT16_MAX = 65504.0


def quantize_imatrix(
    weight: "torch.Tensor", energy: "torch.Tensor", width_bits: int, *, group: int
) -> "IntegerWeight":
    """Return the codes and scales of a matrix.

    Args:
        weight: [out, in], any float dtype.
        energy: [in] float32: mean squared input of each column; all zero counts as all equal.
        width_bits: 1 to 8.
        group: inputs per scale, a multiple of 32; the last group of a row may be short.

    Raises:
        CorruptArtifactError: the matrix holds NaN or infinity.
    """
    import torch

    from moe_tool.quantization.round_to_nearest import from_codes, grid_scales, nearest_codes

    scales = grid_scales(weight, width_bits, group=group)  # [out, G]
    n_out, n_in = weight.shape
    short = scales.shape[1] * group - n_in
    values = torch.nn.functional.pad(weight.float(), (0, short)).view(n_out, -1, group)
    even = torch.ones(n_in) if not energy.any() else energy.float()
    counts = torch.nn.functional.pad(even, (0, short)).view(-1, group)  # [G, group]

    def error_of(codes: "torch.Tensor", steps: "torch.Tensor") -> "torch.Tensor":
        return ((codes * steps.float()[..., None] - values).square_() * counts).sum(dim=-1)

    outermost, first = 2 ** (width_bits - 1), scales.float()
    codes = nearest_codes(values, first[..., None], width_bits)  # [out, G, group]
    error = error_of(codes, scales)  # [out, G]
    for step in _STEPS:
        begin = first * (outermost / (outermost + step))
        tried = nearest_codes(values, begin[..., None], width_bits)
        slope = (tried * values * counts).sum(dim=-1)
        curvature = (tried.square() * counts).sum(dim=-1)
        fitted = torch.where(curvature > 0, slope / curvature, begin)
        fitted = fitted.clamp_(-_FLOAT16_MAX, _FLOAT16_MAX).half()
        found = error_of(tried, fitted)
        is_better = found < error
        error = torch.where(is_better, found, error)
        scales = torch.where(is_better, fitted, scales)
        codes = torch.where(is_better[..., None], tried, codes)
    return from_codes(codes.flatten(1)[:, :n_in].clone(), scales, width_bits, group=group)


def _make(inputs: "ExpertInputs | None") -> QuantizeExpert:
    from moe_tool.quantizers.inputs import by_moments

    assert inputs is not None

    def round_matrix(
        weight: "torch.Tensor", moments: "torch.Tensor", precision: IntegerPrecision
    ) -> "IntegerWeight":
        return quantize_imatrix(
            weight, moments.diagonal(), precision.width_bits, group=precision.group
        )

    return by_moments(inputs, round_matrix)


def _objective(difference: "torch.Tensor", moments: "torch.Tensor") -> float:
    """Return the mean square of the outputs' errors if inputs were uncorrelated."""
    return float((difference.double().square() * moments.diagonal().double()).sum())


SPEC = QuantizerSpec(
    name="imatrix",
    summary="to the nearest code, scales by least squares weighted with each column's mean squared "
    "input",
    make=_make,
    objective=_objective,
    needs_inputs=True,
    source="llama.cpp's importance matrix",
)
