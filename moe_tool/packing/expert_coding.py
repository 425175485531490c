"""Conversion of an expert's tensors to the content of a record: floats, or codes of a quantizer."""

from collections.abc import Mapping

import torch

from moe_tool.artifacts.precision import AnyPrecision
from moe_tool.quantization.weights import AnyWeight, FloatWeight
from moe_tool.quantizers.rtn import nearest
from moe_tool.quantizers.spec import QuantizeExpert


def coded(
    weights: Mapping[str, torch.Tensor],
    precision: AnyPrecision,
    quantize_expert: QuantizeExpert = nearest,
) -> dict[str, AnyWeight]:
    """Return the content of an expert's record.

    Args:
        weights: the expert in canonical form, in the checkpoint's dtype.
        precision: precision of matrices; vectors are unchanged.

    Raises:
        CorruptArtifactError: a weight to be quantized is NaN or infinite.
    """
    found: dict[str, AnyWeight] = {
        name: FloatWeight(values=value) for name, value in weights.items()
    }
    if precision.kind == "integer":
        found |= quantize_expert(weights, precision)
    return found
