"""How an expert's matrices become codes while it is packed: `pack --quantizer`."""

from typing import Literal

import torch

from moe_tool.artifacts.precision import IntegerPrecision
from moe_tool.experts.expert_forward import inner_activations
from moe_tool.formats.expert_record import QuantizeMatrix, nearest
from moe_tool.packing.calibrated_layers import ExpertSample
from moe_tool.quantization.gptq import error_spread, quantize_gptq
from moe_tool.quantization.weights import FloatWeight, IntegerWeight

Quantizer = Literal["rtn", "gptq"]
QUANTIZERS: tuple[Quantizer, ...] = ("rtn", "gptq")
_HESSIAN_TOKENS = 8192


@torch.no_grad()
def quantizer_of(name: Quantizer, sample: ExpertSample) -> QuantizeMatrix:
    """Return what makes codes of one expert's matrices.

    Args:
        name: rtn, or gptq, which takes the second moments of what each matrix is given on the
            tokens that the expert is fitted to.
        sample: of the expert.
    """
    if name == "rtn":
        return nearest
    step = max(1, -(-len(sample.fitted_on) // _HESSIAN_TOKENS))
    inputs = sample.fitted_on[::step]
    exact = {key: FloatWeight(values=value) for key, value in sample.tensors.items()}
    inner = inner_activations(sample.module, exact, inputs)
    first, second = (error_spread(_second_moments(each)) for each in (inputs, inner))

    def quantize_matrix(
        tensor: str, weight: torch.Tensor, precision: IntegerPrecision
    ) -> IntegerWeight:
        spread = second if tensor == "down_proj" else first
        return quantize_gptq(weight, spread, precision.width_bits, group=precision.group)

    return quantize_matrix


def _second_moments(inputs: torch.Tensor) -> torch.Tensor:
    """[in, in] float32, of [n, in]; zero without inputs."""
    return inputs.T @ inputs / max(1, len(inputs))
