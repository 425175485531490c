"""Rounding with zero points robust to outliers, by the weights alone (HQQ)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from moe_tool.artifacts.precision import IntegerPrecision
from moe_tool.quantizers.spec import QuantizerSpec

if TYPE_CHECKING:
    import torch

    from moe_tool.quantization.weights import IntegerWeight


def _quantize(
    weights: "Mapping[str, torch.Tensor]", precision: IntegerPrecision
) -> "dict[str, IntegerWeight]":
    from moe_tool.quantization.hqq import quantize_hqq
    from moe_tool.quantizers.inputs import matrices

    assert precision.zeros
    return {
        name: quantize_hqq(weight, precision.width_bits, group=precision.group)
        for name, weight in matrices(weights)
    }


SPEC = QuantizerSpec(
    name="hqq",
    summary="to the nearest code, with zero points robust to outliers",
    make=lambda _: _quantize,
    makes_zeros=True,
    source="Badri and Shaji 2023",
)
