"""Forms of one expert, made and measured on held-out tokens."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from moe_tool.artifacts.form_table import Role
from moe_tool.artifacts.pack_plan import Quantizer
from moe_tool.artifacts.precision import AnyPrecision, ChannelPrecision
from moe_tool.experts.expert_forward import expert_forward
from moe_tool.formats.record_form import RecordForm
from moe_tool.packing.calibrated_layers import ExpertSample
from moe_tool.packing.channel_expert import channel_expert
from moe_tool.packing.expert_coding import coded
from moe_tool.quantization.channels import ChannelExpert
from moe_tool.quantization.low_rank import LinearFit, linear_fit, low_rank_map
from moe_tool.quantization.weights import AnyWeight, FloatWeight, base_of
from moe_tool.quantizers.registry import QUANTIZERS
from moe_tool.quantizers.spec import QuantizeExpert

MEASURED_TOKENS = 256
"""Most held-out tokens that a price is measured on"""
_FIT_TOKENS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRecord:
    """One form of one expert."""

    record: torch.Tensor
    """Record, uint8 [form's layout.size_bytes]"""
    eps: float | None
    """Measured error, see FormRecord; None for a selector"""
    base_eps: float | None = None
    """Measured error of a nested expert's base"""


class ExpertRecords:
    """Maker of an expert's forms; exact outputs, best linear map and channels are computed once."""

    def __init__(self, sample: ExpertSample, quantizer: Quantizer) -> None:
        """Keep the expert with its inputs, and the quantizer of its forms."""
        self._sample = sample
        self._quantizer = quantizer
        self._channels: dict[ChannelPrecision, ChannelExpert] = {}

    @torch.no_grad()
    def make(
        self, form: RecordForm[Any], precision: AnyPrecision, role: Role = "primary"
    ) -> MeasuredRecord:
        """Return the expert in the form of a table with this precision and role.

        Raises:
            CorruptArtifactError: a weight is NaN or infinite.
            UnsupportedModelError: channels of an expert without a known gate.
        """
        tensors = self._sample.tensors
        if precision.kind == "channels":
            if precision not in self._channels:
                self._channels[precision] = channel_expert(self._sample, precision, self._quantizer)
            expert = self._channels[precision]
            if role == "selector":
                return MeasuredRecord(record=form.encode(expert.selector), eps=None)
            return MeasuredRecord(record=form.encode(expert), eps=self._error(expert))
        if precision.kind == "low-rank":
            tensors = low_rank_map(self._linear_fit, precision.rank)
        record = form.encode(coded(tensors, precision, self._quantize))
        if precision.kind == "native":
            return MeasuredRecord(record=record, eps=0.0)
        weights = form.decode(record)
        return MeasuredRecord(
            record=record,
            eps=self._error(weights),
            base_eps=None if precision.base is None else self._error(base_of(weights)),
        )

    def _error(self, weights: Mapping[str, AnyWeight]) -> float:
        answer = expert_forward(self._sample.module, weights, self._sample.measured_on)
        return relative_error(self._truth, answer)

    @cached_property
    def _quantize(self) -> QuantizeExpert:
        return QUANTIZERS[self._quantizer].make(self._sample.inputs)

    @cached_property
    def _exact(self) -> dict[str, FloatWeight]:
        return {name: FloatWeight(values=value) for name, value in self._sample.tensors.items()}

    @cached_property
    def _truth(self) -> torch.Tensor:
        """Exact outputs, [m, H]"""
        return expert_forward(self._sample.module, self._exact, self._sample.measured_on)

    @cached_property
    def _linear_fit(self) -> LinearFit:
        step = max(1, -(-len(self._sample.fitted_on) // _FIT_TOKENS))
        inputs = self._sample.fitted_on[::step]
        return linear_fit(inputs, expert_forward(self._sample.module, self._exact, inputs))


def relative_error(truth: torch.Tensor, answer: torch.Tensor) -> float:
    """Return sqrt(sum ||truth - answer||^2 / sum ||truth||^2) of [m, H] each; 1 for m = 0."""
    energy = float(truth.double().square().sum())
    error = float((truth.double() - answer.double()).square().sum())
    if energy > 0:
        return math.sqrt(error / energy)
    return 1.0 if error > 0 or truth.numel() == 0 else 0.0
