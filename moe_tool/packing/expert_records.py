"""All forms of one expert: made, and measured on tokens that they were not fitted to."""

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
from moe_tool.quantization.weights import FloatWeight, IntegerWeight, base_of
from moe_tool.quantizers.registry import QUANTIZERS
from moe_tool.quantizers.spec import QuantizeExpert

MEASURED_TOKENS = 256
"""Held-out tokens behind a price"""
_FIT_TOKENS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRecord:
    """One form of one expert."""

    record: torch.Tensor
    """Record, uint8 [form's layout.size_bytes]"""
    eps: float | None
    """Measured error, see FormRecord; None: not an answer"""
    base_eps: float | None = None
    """Measured error of a nested expert's first bits"""


class ExpertRecords:
    """Makes the forms of an expert; what they share, its exact answers, its best linear map, its
    channels, is computed once."""

    def __init__(self, sample: ExpertSample, quantizer: Quantizer) -> None:
        """Take what the forms are made of.

        Args:
            sample: of the expert.
            quantizer: makes the codes of forms that have any.
        """
        self._sample = sample
        self._quantizer = quantizer
        self._channels: dict[ChannelPrecision, ChannelExpert] = {}

    @torch.no_grad()
    def make(
        self, form: RecordForm[Any], precision: AnyPrecision, role: Role = "primary"
    ) -> MeasuredRecord:
        """Return the expert in a form.

        Args:
            form: of the records of a table.
            precision: of the table.
            role: of the table.

        Raises:
            CorruptArtifactError: a weight is NaN or infinite.
            UnsupportedModelError: channels of an expert that has no gate that is known.
        """
        tensors = self._sample.tensors
        if precision.kind == "channels":
            expert = self._in_channels(precision)
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

    def _in_channels(self, precision: ChannelPrecision) -> ChannelExpert:
        if precision not in self._channels:
            self._channels[precision] = channel_expert(self._sample, precision, self._quantizer)
        return self._channels[precision]

    def _error(self, weights: Mapping[str, FloatWeight | IntegerWeight]) -> float:
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
        """Exact answers, [m, H]"""
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
