"""Rounding to the nearest code, the scale from each group's largest weight."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from moe_tool.artifacts.precision import IntegerPrecision
from moe_tool.quantizers.spec import QuantizerSpec, weight_error

if TYPE_CHECKING:
    import torch

    from moe_tool.quantization.weights import IntegerWeight


def nearest(
    weights: "Mapping[str, torch.Tensor]", precision: IntegerPrecision
) -> "dict[str, IntegerWeight]":
    """Return the codes of every matrix, rounded to nearest by the kernel where it was built."""
    from moe_tool.native.rounding import round_matrix
    from moe_tool.quantization.nested import with_base
    from moe_tool.quantizers.inputs import matrices

    assert not precision.zeros
    found = {
        name: round_matrix(weight, precision.width_bits, group=precision.group)
        for name, weight in matrices(weights)
    }
    if precision.base_bits is None:
        return found
    return {name: with_base(weights[name], coded) for name, coded in found.items()}


SPEC = QuantizerSpec(
    name="rtn",
    summary="to the nearest code",
    make=lambda _: nearest,
    objective=weight_error,
    is_profiled=True,
)
