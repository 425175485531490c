"""Rounding to the nearest code, scales by least squares on the outputs."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from moe_tool.artifacts.precision import IntegerPrecision
from moe_tool.quantizers.objectives import output_error
from moe_tool.quantizers.spec import QuantizeExpert, QuantizerSpec

if TYPE_CHECKING:
    import torch

    from moe_tool.quantization.weights import IntegerWeight
    from moe_tool.quantizers.inputs import ExpertInputs


def _make(inputs: "ExpertInputs | None") -> QuantizeExpert:
    from moe_tool.quantization.fitted_scales import quantize_fitted
    from moe_tool.quantization.nested import with_base
    from moe_tool.quantizers.inputs import matrices

    assert inputs is not None

    def quantize(
        weights: "Mapping[str, torch.Tensor]", precision: IntegerPrecision
    ) -> "dict[str, IntegerWeight]":
        found = {}
        for name, weight in matrices(weights):
            moments = inputs.moments(name)
            coded = quantize_fitted(weight, moments, precision.width_bits, group=precision.group)
            is_nested = precision.base_bits is not None
            found[name] = with_base(weight, coded, moments) if is_nested else coded
        return found

    return quantize


SPEC = QuantizerSpec(
    name="fitted",
    summary="to the nearest code, scales by least squares on the outputs",
    make=_make,
    objective=output_error,
    needs_inputs=True,
)
