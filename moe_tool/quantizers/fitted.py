"""Rounding to the nearest code, scales by least squares on the outputs."""

from typing import TYPE_CHECKING

from moe_tool.artifacts.precision import IntegerPrecision
from moe_tool.quantizers.spec import QuantizeExpert, QuantizerSpec, output_error

if TYPE_CHECKING:
    import torch

    from moe_tool.quantization.weights import IntegerWeight
    from moe_tool.quantizers.inputs import ExpertInputs


def _make(inputs: "ExpertInputs | None") -> QuantizeExpert:
    from moe_tool.quantization.fitted_scales import quantize_fitted
    from moe_tool.quantizers.inputs import by_moments

    assert inputs is not None

    def round_matrix(
        weight: "torch.Tensor", moments: "torch.Tensor", precision: IntegerPrecision
    ) -> "IntegerWeight":
        return quantize_fitted(weight, moments, precision.width_bits, group=precision.group)

    return by_moments(inputs, round_matrix)


SPEC = QuantizerSpec(
    name="fitted",
    summary="to the nearest code, scales by least squares on the outputs",
    make=_make,
    objective=output_error,
    needs_inputs=True,
)
