"""One expert in one form: made, and measured on tokens that it was not fitted to."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from moe_tool.artifacts.precision import LowRankPrecision, NativePrecision
from moe_tool.experts.expert_forward import expert_forward
from moe_tool.packing.calibrated_layers import ExpertSample
from moe_tool.packing.expert_coding import QuantizeExpert
from moe_tool.quantization.low_rank import LinearFit, linear_fit, low_rank_map
from moe_tool.quantization.weights import FloatWeight, IntegerWeight, base_of

MEASURED_TOKENS = 256
"""Held-out tokens behind a price"""
_FIT_TOKENS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRecord:
    """One form of one expert."""

    record: torch.Tensor
    """uint8 [form's layout.size_bytes]"""
    eps: float | None
    """Its price, see artifacts/expert_statistics; None: not an answer"""
    base_eps: float | None = None
    """That of a nested expert's first bits"""


class ExpertForms:
    """What an expert's forms have in common: its exact answers, its best linear map."""

    def __init__(self, sample: ExpertSample, quantize_expert: QuantizeExpert) -> None:
        """Keep what they are made of.

        Args:
            sample: of the expert.
            quantize_expert: makes the codes of forms that have any.
        """
        self._sample = sample
        self._quantize_expert = quantize_expert

    @torch.no_grad()
    def make(self, form: AnyForm) -> MeasuredRecord:
        """Return the expert in a form.

        Raises:
            CorruptArtifactError: a weight is NaN or infinite.
        """
        assert isinstance(form, ExpertForm)
        sample = self._sample
        tensors = sample.tensors
        if isinstance(form.precision, LowRankPrecision):
            tensors = low_rank_map(self._linear_fit, form.precision.rank)
        record = form.encode(tensors, quantize_expert=self._quantize_expert)
        if isinstance(form.precision, NativePrecision):
            return MeasuredRecord(record=record, eps=0.0)
        weights = form.decode(record)
        is_nested = form.precision.kind == "integer" and form.precision.base_bits is not None
        return MeasuredRecord(
            record=record,
            eps=self._error(weights),
            base_eps=self._error(base_of(weights)) if is_nested else None,
        )

    def _error(self, weights: Mapping[str, FloatWeight | IntegerWeight]) -> float:
        answer = expert_forward(self._sample.module, weights, self._sample.measured_on)
        return relative_error(self._truth, answer)

    @cached_property
    def _exact(self) -> dict[str, FloatWeight]:
        return {name: FloatWeight(values=value) for name, value in self._sample.tensors.items()}

    @cached_property
    def _truth(self) -> torch.Tensor:
        """[m, H]"""
        return expert_forward(self._sample.module, self._exact, self._sample.measured_on)

    @cached_property
    def _linear_fit(self) -> LinearFit:
        step = max(1, -(-len(self._sample.fitted_on) // _FIT_TOKENS))
        inputs = self._sample.fitted_on[::step]
        return linear_fit(inputs, expert_forward(self._sample.module, self._exact, inputs))


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
