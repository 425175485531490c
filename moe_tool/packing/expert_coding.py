"""How an expert's matrices become codes: the signature of a quantizer, and rounding to nearest."""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from moe_tool.artifacts.precision import AnyPrecision, IntegerPrecision
from moe_tool.quantization.nested import with_base
from moe_tool.quantization.round_to_nearest import quantize
from moe_tool.quantization.weights import FloatWeight, IntegerWeight

QuantizeExpert = Callable[
    [Mapping[str, torch.Tensor], IntegerPrecision], Mapping[str, IntegerWeight]
]
"""(an expert's tensors, how) -> the codes of its matrices"""


class RoundMatrix(Protocol):
    """Rounds a matrix to nearest as `quantize` does."""

    def __call__(self, weight: torch.Tensor, width_bits: int, *, group: int) -> IntegerWeight:
        """Return its codes and scales."""


def nearest(
    weights: Mapping[str, torch.Tensor],
    precision: IntegerPrecision,
    *,
    round_matrix: RoundMatrix = quantize,
) -> dict[str, IntegerWeight]:
    """Round every matrix to nearest, with `quantize` or what does the same faster."""
    assert not precision.zeros
    found = {
        name: round_matrix(weight, precision.width_bits, group=precision.group)
        for name, weight in weights.items()
        if weight.dim() == 2
    }
    if precision.base_bits is None:
        return found
    return {name: with_base(weights[name], coded) for name, coded in found.items()}


def coded(
    weights: Mapping[str, torch.Tensor],
    precision: AnyPrecision,
    quantize_expert: QuantizeExpert = nearest,
) -> dict[str, FloatWeight | IntegerWeight]:
    """Return an expert's tensors as a record of a precision holds them.

    Args:
        weights: the expert in canonical form, in the checkpoint's dtype.
        precision: of matrices; vectors stay as they are.
        quantize_expert: makes the codes where the precision has any.

    Raises:
        CorruptArtifactError: a weight to be quantized is NaN or infinite.
    """
    found: dict[str, FloatWeight | IntegerWeight] = {
        name: FloatWeight(values=value) for name, value in weights.items()
    }
    if precision.kind == "integer":
        found |= quantize_expert(weights, precision)
    return found
