"""Rounding to the nearest code, scales by least squares on the outputs."""

from moe_tool.quantization.fitted_scales import quantize_fitted
from moe_tool.quantizers.inputs import ExpertInputs, by_moments
from moe_tool.quantizers.spec import QuantizeExpert


def make(inputs: ExpertInputs) -> QuantizeExpert:
    return by_moments(inputs, quantize_fitted)
