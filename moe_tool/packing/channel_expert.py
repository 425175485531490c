"""Conversion of one expert to channels with thresholds, by its inputs (FloE, arXiv:2505.05950).

The selector matrix is quantized by the chosen quantizer. Each row or column of a channel has its
own scales along its whole length, so columns are rounded to nearest. If the quantizer refits the
last matrix, as gptq does, that happens first, for the outputs of the rounded matrices before it.
"""

import numpy as np
import torch

from moe_tool.artifacts.pack_plan import Quantizer
from moe_tool.artifacts.precision import ChannelPrecision
from moe_tool.experts.channel_forward import (
    channel_gate,
    channel_sizes,
    selector_values,
    split_halves,
)
from moe_tool.formats.channel_form import FIRST, LAST, chunk_hashes
from moe_tool.packing.calibrated_layers import ExpertSample
from moe_tool.quantization.channels import (
    GRID,
    ChannelExpert,
    ChannelWeight,
    Selector,
    pack_channels,
)
from moe_tool.quantization.round_to_nearest import dequantize
from moe_tool.quantization.weights import FloatWeight, IntegerWeight
from moe_tool.quantizers.registry import QUANTIZERS
from moe_tool.quantizers.rtn import nearest

_THRESHOLD_TOKENS = 1024
_FLOAT16_MAX = 65504.0


def channel_expert(
    sample: ExpertSample, precision: ChannelPrecision, quantizer: Quantizer
) -> ChannelExpert:
    """Return an expert's channels with their selector.

    Args:
        quantizer: quantizer of the selector matrix and of rows.

    Raises:
        CorruptArtifactError: a weight is NaN or infinite.
        UnsupportedModelError: the expert has no known gate.
    """
    gate = channel_gate(sample.module)
    gates, ups = (half.contiguous() for half in split_halves(gate, sample.tensors[FIRST]))
    is_gate = precision.selected_by == "gate"
    selecting, other = (gates, ups) if is_gate else (ups, gates)
    spec, inputs = QUANTIZERS[quantizer], sample.inputs
    quantize = spec.make(inputs)
    weight = quantize({"selector": selecting}, precision.selector)["selector"]
    # Channels have no zero points.
    symmetric = nearest if spec.makes_zeros else quantize
    row = symmetric({"row": other}, precision.rows)["row"]
    last = sample.tensors[LAST]
    if spec.refit_last is not None:
        joined = torch.empty(sample.tensors[FIRST].shape)
        to_gates, to_ups = split_halves(gate, joined)
        to_selecting, to_other = (to_gates, to_ups) if is_gate else (to_ups, to_gates)
        to_selecting.copy_(dequantize(weight))
        to_other.copy_(dequantize(row))
        last = spec.refit_last(inputs, last, {FIRST: FloatWeight(values=joined)})
    column = nearest({"column": last.T.contiguous()}, precision.rows)["column"]
    channels = pack_channels(row, column)
    return ChannelExpert(channels, _selector(sample, weight, channels, is_gate=is_gate))


def _selector(
    sample: ExpertSample, weight: IntegerWeight, channels: ChannelWeight, *, is_gate: bool
) -> Selector:
    """Return the selector, with thresholds from its absolute outputs over all channels."""
    selector = Selector(
        weight=weight,
        is_gate=is_gate,
        thresholds=np.zeros(len(GRID), dtype=np.float32),
        hashes=chunk_hashes(channels.chunks),
        biases={
            name: FloatWeight(values=value)
            for name, value in sample.tensors.items()
            if value.dim() == 1
        },
    )
    inputs = sample.fitted_on
    inputs = inputs[:: max(1, -(-len(inputs) // _THRESHOLD_TOKENS))]
    if len(inputs):
        module = sample.module
        sizes = channel_sizes(module, selector, selector_values(module, selector, inputs))
        found = np.quantile(sizes.numpy(), GRID, method="inverted_cdf")
        selector.thresholds[1:] = np.minimum(found[1:], _FLOAT16_MAX)
    return selector
