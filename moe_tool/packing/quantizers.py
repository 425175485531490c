"""Quantizers for what is packed: by name, with an expert's sample at hand."""

from collections.abc import Mapping

import torch

from moe_tool.artifacts.pack_plan import Quantizer
from moe_tool.packing.calibrated_layers import ExpertSample
from moe_tool.quantization.weights import FloatWeight
from moe_tool.quantizers.inputs import ExpertInputs
from moe_tool.quantizers.registry import QUANTIZERS
from moe_tool.quantizers.rtn import nearest
from moe_tool.quantizers.spec import QuantizeExpert


def data_free(name: Quantizer) -> QuantizeExpert:
    """Return a quantizer that goes by the weights alone: the nearest to one that does not."""
    spec = QUANTIZERS[name]
    return nearest if spec.needs_inputs else spec.make(None)


def calibrated(name: Quantizer, sample: ExpertSample) -> QuantizeExpert:
    """Return what makes codes of one expert's matrices, with its inputs at hand."""
    return QUANTIZERS[name].make(_inputs(sample))


def last_matrix_after(
    name: Quantizer, sample: ExpertSample, weight: torch.Tensor, before: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Return the last matrix, fitted to what inexact ones before it give where the quantizer does.

    Args:
        name: of the quantizer.
        sample: of the expert.
        weight: [H, I], the expert's own.
        before: the inexact matrices by name, float32.
    """
    refit = QUANTIZERS[name].refit_last
    if refit is None:
        return weight
    given = {each: FloatWeight(values=value) for each, value in before.items()}
    return refit(_inputs(sample), weight, given)


def _inputs(sample: ExpertSample) -> ExpertInputs:
    return ExpertInputs(sample.module, sample.tensors, sample.fitted_on)
