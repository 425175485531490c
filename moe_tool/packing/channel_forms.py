"""One expert in channels: made from its inputs, with thresholds, and measured (FloE,
arXiv:2505.05950).

The matrix that chooses is quantized as any other, by the quantizer that was asked for. A row or a
column of a channel has scales of its own along its whole length, so columns are rounded to the
nearest. With gptq the last matrix is first fitted to what the rounded ones before it give, as it is
for experts that are whole.
"""

from functools import cached_property

import numpy as np
import torch

from moe_tool.artifacts.pack_plan import Quantizer
from moe_tool.artifacts.precision import ChannelPrecision
from moe_tool.experts.channel_forward import (
    channel_gate,
    channel_sizes,
    chooser_values,
    split_halves,
)
from moe_tool.experts.expert_forward import expert_forward
from moe_tool.formats.channel_record import (
    FIRST,
    LAST,
    chunk_hashes,
    encode_channels,
    encode_chooser,
)
from moe_tool.formats.expert_form import AnyForm, ChannelForm
from moe_tool.packing.calibrated_layers import ExpertSample
from moe_tool.packing.quantizers import calibrated, last_matrix_after
from moe_tool.packing.replicas import MeasuredRecord, relative_error
from moe_tool.quantization.channels import (
    GRID,
    ChannelExpert,
    ChannelWeight,
    Chooser,
    pack_channels,
)
from moe_tool.quantization.round_to_nearest import dequantize
from moe_tool.quantization.weights import FloatWeight, IntegerWeight
from moe_tool.quantizers.registry import QUANTIZERS
from moe_tool.quantizers.rtn import nearest

_THRESHOLD_TOKENS = 1024
_FLOAT16_MAX = 65504.0


class ChannelForms:
    """An expert's channels and what chooses them; the counterpart of ExpertForms."""

    def __init__(
        self, sample: ExpertSample, precision: ChannelPrecision, quantizer: Quantizer
    ) -> None:
        """Keep what they are made of.

        Args:
            sample: of the expert.
            precision: of its parts.
            quantizer: of the matrix that chooses, and of rows.
        """
        self._sample = sample
        self._precision = precision
        self._quantizer = quantizer

    @torch.no_grad()
    def make(self, form: AnyForm) -> MeasuredRecord:
        """Return the record of channels, with the whole expert's price, or that of the chooser.

        Raises:
            CorruptArtifactError: a weight is NaN or infinite.
            UnsupportedModelError: the expert has no gate that is known.
        """
        assert isinstance(form, ChannelForm)
        expert = self._expert
        assert expert.chooser is not None
        if form.is_chooser:
            return MeasuredRecord(record=encode_chooser(form.layout, expert.chooser), eps=None)
        sample = self._sample
        exact = {name: FloatWeight(values=value) for name, value in sample.tensors.items()}
        truth = expert_forward(sample.module, exact, sample.measured_on)
        answer = expert_forward(sample.module, expert, sample.measured_on)
        return MeasuredRecord(
            record=encode_channels(form.layout, expert.channels),
            eps=relative_error(truth, answer),
        )

    @cached_property
    def _expert(self) -> ChannelExpert:
        tensors, precision = self._sample.tensors, self._precision
        gate = channel_gate(self._sample.module)
        gates, ups = (half.contiguous() for half in split_halves(gate, tensors[FIRST]))
        is_gate = precision.chosen_by == "gate"
        choosing, other = (gates, ups) if is_gate else (ups, gates)
        quantize = calibrated(self._quantizer, self._sample)
        weight = quantize({"chooser": choosing}, precision.chooser)["chooser"]
        # Channels have no zero points.
        symmetric = nearest if QUANTIZERS[self._quantizer].makes_zeros else quantize
        row = symmetric({"row": other}, precision.rows)["row"]
        last = tensors[LAST]
        if QUANTIZERS[self._quantizer].refit_last is not None:
            joined = torch.empty(tensors[FIRST].shape)
            to_gates, to_ups = split_halves(gate, joined)
            to_choosing, to_other = (to_gates, to_ups) if is_gate else (to_ups, to_gates)
            to_choosing.copy_(dequantize(weight))
            to_other.copy_(dequantize(row))
            last = last_matrix_after(self._quantizer, self._sample, last, {FIRST: joined})
        column = nearest({"column": last.T.contiguous()}, precision.rows)["column"]
        channels = pack_channels(row, column)
        return ChannelExpert(channels, self._chooser(weight, channels))

    def _chooser(self, weight: IntegerWeight, channels: ChannelWeight) -> Chooser:
        """With the sizes of its output on the expert's own tokens, whatever channel they are of."""
        chooser = Chooser(
            weight=weight,
            is_gate=self._precision.chosen_by == "gate",
            thresholds=np.zeros(len(GRID), dtype=np.float32),
            hashes=chunk_hashes(channels.chunks),
            biases={
                name: FloatWeight(values=value)
                for name, value in self._sample.tensors.items()
                if value.dim() == 1
            },
        )
        inputs = self._sample.fitted_on
        inputs = inputs[:: max(1, -(-len(inputs) // _THRESHOLD_TOKENS))]
        if len(inputs):
            module = self._sample.module
            sizes = channel_sizes(module, chooser, chooser_values(module, chooser, inputs))
            found = np.quantile(sizes.numpy(), GRID, method="inverted_cdf")
            chooser.thresholds[1:] = np.minimum(found[1:], _FLOAT16_MAX)
        return chooser
