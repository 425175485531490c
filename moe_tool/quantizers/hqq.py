"""Rounding with zero points robust to outliers, by the weights alone (HQQ)."""

from collections.abc import Mapping

import torch

from moe_tool.artifacts.precision import IntegerPrecision
from moe_tool.quantization.hqq import quantize_hqq
from moe_tool.quantization.weights import IntegerWeight
from moe_tool.quantizers.inputs import ExpertInputs, matrices
from moe_tool.quantizers.spec import QuantizeExpert


def make(_: ExpertInputs | None) -> QuantizeExpert:
    return _quantize


def _quantize(
    weights: Mapping[str, torch.Tensor], precision: IntegerPrecision
) -> dict[str, IntegerWeight]:
    assert precision.zeros
    return {
        name: quantize_hqq(weight, precision.width_bits, group=precision.group)
        for name, weight in matrices(weights)
    }
