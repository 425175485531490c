"""Cheaper forms of one expert: made, and measured on tokens that they were not fitted to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moe_tool.artifacts.precision import LowRankPrecision
from moe_tool.experts.expert_forward import expert_forward
from moe_tool.formats.expert_form import ExpertForm
from moe_tool.formats.expert_record import QuantizeMatrix
from moe_tool.packing.calibrated_layers import ExpertSample
from moe_tool.quantization.low_rank import LinearFit, linear_fit, low_rank_map
from moe_tool.quantization.weights import FloatWeight

MEASURED_TOKENS = 256
"""Held-out tokens behind a price"""
_FIT_TOKENS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """One cheaper form of one expert."""

    record: torch.Tensor
    """uint8 [form's layout.size_bytes]"""
    eps: float
    """Its price, see artifacts/expert_statistics"""


@torch.no_grad()
def make_replicas(
    sample: ExpertSample, forms: Sequence[ExpertForm], quantize_matrix: QuantizeMatrix
) -> list[Replica]:
    """Return an expert in each of the forms.

    Args:
        sample: of the expert.
        forms: of replicas.
        quantize_matrix: makes the codes of those that have any.

    Raises:
        CorruptArtifactError: a weight is NaN or infinite.
    """
    exact = {name: FloatWeight(values=value) for name, value in sample.tensors.items()}
    truth = expert_forward(sample.module, exact, sample.measured_on)  # [m, H]
    fit: LinearFit | None = None
    replicas = []
    for form in forms:
        tensors = sample.tensors
        if isinstance(form.precision, LowRankPrecision):
            if fit is None:
                step = max(1, -(-len(sample.fitted_on) // _FIT_TOKENS))
                inputs = sample.fitted_on[::step]
                fit = linear_fit(inputs, expert_forward(sample.module, exact, inputs))
            tensors = low_rank_map(fit, form.precision.rank)
        record = form.encode(tensors, quantize_matrix=quantize_matrix)
        answer = expert_forward(sample.module, form.decode(record), sample.measured_on)
        replicas.append(Replica(record=record, eps=relative_error(truth, answer)))
    return replicas


def relative_error(truth: torch.Tensor, answer: torch.Tensor) -> float:
    """Return sqrt(sum ||truth - answer||^2 / sum ||truth||^2); 1 where there is nothing to judge
    by.

    Args:
        truth: [m, H] float32.
        answer: [m, H] float32.
    """
    energy = float(truth.double().square().sum())
    error = float((truth.double() - answer.double()).square().sum())
    if energy > 0:
        return math.sqrt(error / energy)
    return 1.0 if error > 0 or truth.numel() == 0 else 0.0
