"""Quantization of Mixture Compressor: GPTQ, and at one bit signs with one scale for the matrix.

The scale of one bit is the mean magnitude of the matrix, as printed; a bundle's records hold a
scale per group, so that it is written once for each. The released code takes a scale per group of
128 instead, which is `rtn` at one bit.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from moe_tool.artifacts.precision import IntegerPrecision
from moe_tool.quantizers import gptq
from moe_tool.quantizers.spec import QuantizeExpert, QuantizerSpec

if TYPE_CHECKING:
    import torch

    from moe_tool.quantization.weights import IntegerWeight
    from moe_tool.quantizers.inputs import ExpertInputs


def quantize_signs(weight: "torch.Tensor", *, group: int) -> "IntegerWeight":
    """Return a matrix's signs, all with the scale of its mean magnitude.

    Args:
        weight: [out, in], any float dtype.
        group: inputs per stored scale, a multiple of 32.

    Raises:
        CorruptArtifactError: the matrix holds NaN or infinity.
    """
    import torch

    from moe_tool.quantization.round_to_nearest import from_codes, grid_scales, nearest_codes

    scales = grid_scales(weight, 1, group=group)  # [out, G]: refuses what is not finite
    mean = weight.float().abs().mean().clamp_(max=torch.finfo(torch.float16).max)
    codes = nearest_codes(weight.float(), mean, 1)
    return from_codes(codes, torch.full_like(scales, float(mean)), 1, group=group)


def _make(inputs: "ExpertInputs | None") -> QuantizeExpert:
    compensated = gptq.SPEC.make(inputs)

    def quantize(
        weights: "Mapping[str, torch.Tensor]", precision: IntegerPrecision
    ) -> "Mapping[str, IntegerWeight]":
        from moe_tool.quantizers.inputs import matrices

        if precision.width_bits > 1:
            return compensated(weights, precision)
        return {
            name: quantize_signs(weight, group=precision.group)
            for name, weight in matrices(weights)
        }

    return quantize


SPEC = QuantizerSpec(
    name="mc",
    summary="as gptq; at one bit signs times the mean magnitude of the whole matrix",
    make=_make,
    needs_inputs=True,
    refit_last=gptq.SPEC.refit_last,
    source="arXiv:2410.06270",
)
