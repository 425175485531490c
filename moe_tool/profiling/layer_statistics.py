"""Statistics of one layer, from its trace, its experts and its input on a sample of tokens."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from moe_tool.artifacts.expert_statistics import (
    PRICED_WIDTHS,
    ExpertStatistics,
    RoutingCounts,
)
from moe_tool.artifacts.router_trace import LayerTrace, TracedTokens
from moe_tool.experts.expert_forward import expert_forward
from moe_tool.profiling.expert_probe import (
    MIN_ROUTED_TOKENS,
    ExpertProbe,
    bits_price,
    probe_blocks,
)
from moe_tool.profiling.layer_recording import LayerRecording
from moe_tool.profiling.routing_counts import count_routing
from moe_tool.profiling.similarity import router_similarity
from moe_tool.quantization.round_to_nearest import round_trip
from moe_tool.quantization.weights import FloatWeight

MAX_PRICED_TOKENS = 256
"""Maximum number of routed tokens per expert for `eps_bits`."""

Experts = Mapping[int, Mapping[str, FloatWeight]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sample:
    """In-sample or held-out part of the sample, n tokens."""

    inputs: torch.Tensor
    """[n, H] layer input"""
    routed: np.ndarray
    """[n, E] bool: True for chosen experts"""
    gate: np.ndarray
    """[n, E] float32 gate weights, 0 where not chosen"""


@torch.no_grad()
def measure_layer(
    module: nn.Module,
    experts: Experts,
    recording: LayerRecording,
    tokens: TracedTokens,
    *,
    probe_bytes: int,
) -> ExpertStatistics:
    """Return a layer's statistics, with sensitivity 0 until the pass over all layers is complete.

    Args:
        experts: the layer's experts in canonical form.
        probe_bytes: room for one block of all experts' outputs.

    Raises:
        CorruptArtifactError: a weight is not finite.
    """
    is_held_out = np.repeat(tokens.held_out, tokens.ids.shape[1])  # [T]
    in_sample, held_out = (
        _part_of_sample(recording, part[recording.sample_rows])
        for part in (~is_held_out, is_held_out)
    )
    probe = _probe(module, experts, in_sample, probe_bytes)
    probe_held_out = _probe(module, experts, held_out, probe_bytes)
    statistics = probe.finish()
    prices, n_priced = _price_bits(module, experts, in_sample)
    return ExpertStatistics(
        in_sample=_counts(recording.trace, tokens, ~is_held_out),
        held_out=_counts(recording.trace, tokens, is_held_out),
        probe=statistics,
        probe_held_out=probe_held_out.finish(),
        eps_buddy_transferred=probe_held_out.price_of_scales(statistics.scale),
        eps_bits=prices,
        eps_bits_n_tokens=n_priced,
        router_similarity=router_similarity(recording.trace.router_logits[~is_held_out]),
        sensitivity=0.0,
        sensitivity_n_tokens=0,
    )


def _counts(trace: LayerTrace, tokens: TracedTokens, part: np.ndarray) -> RoutingCounts:
    """Return the counts over a part, [T] bool, of the tokens."""
    rows = np.flatnonzero(part)
    sequence = rows // tokens.ids.shape[1]
    return count_routing(
        top_k_index=trace.top_k_index[rows],
        top_k_weight=trace.top_k_weight[rows],
        domain_of_token=tokens.domain[sequence],
        sequence_of_token=sequence,
        n_experts=trace.router_logits.shape[1],
        n_domains=len(tokens.domains),
    )


def _part_of_sample(recording: LayerRecording, chosen: np.ndarray) -> _Sample:
    """Return a part, [n] bool, of the probe's tokens."""
    trace, rows = recording.trace, recording.sample_rows[chosen]
    index = trace.top_k_index[rows].astype(np.int64)  # [n, K]
    shape = (len(rows), trace.router_logits.shape[1])
    routed, gate = np.zeros(shape, bool), np.zeros(shape, np.float32)
    np.put_along_axis(routed, index, True, axis=1)
    np.put_along_axis(gate, index, trace.top_k_weight[rows].astype(np.float32), axis=1)
    return _Sample(
        inputs=recording.sample_input[torch.from_numpy(chosen)], routed=routed, gate=gate
    )


def _probe(module: nn.Module, experts: Experts, sample: _Sample, probe_bytes: int) -> ExpertProbe:
    n_tokens, hidden = sample.inputs.shape
    probe = ExpertProbe(n_experts=len(experts))
    for rows in probe_blocks(
        n_tokens, n_experts=len(experts), hidden=hidden, memory_bytes=probe_bytes
    ):
        inputs = sample.inputs[rows].contiguous()
        outputs = torch.empty(len(experts), *inputs.shape)  # [E, b, H]
        for expert in range(len(experts)):
            outputs[expert] = expert_forward(module, experts[expert], inputs)
        probe.add_block(outputs, routed=sample.routed[rows], gate=sample.gate[rows])
    return probe


def _price_bits(
    module: nn.Module, experts: Experts, sample: _Sample
) -> tuple[np.ndarray, np.ndarray]:
    """Return [E, 5] prices by width and [E] numbers of tokens that they were measured on."""
    prices = np.zeros((len(experts), len(PRICED_WIDTHS)), np.float32)
    n_priced = np.zeros(len(experts), np.int64)
    for expert in range(len(experts)):
        rows = np.flatnonzero(sample.routed[:, expert])
        if len(rows) < MIN_ROUTED_TOKENS:
            rows = np.arange(len(sample.inputs))
        inputs = sample.inputs[torch.from_numpy(rows[:MAX_PRICED_TOKENS])]
        weights = experts[expert]
        exact = expert_forward(module, weights, inputs)
        approximations = {
            width: expert_forward(module, _rounded(weights, width), inputs)
            for width in PRICED_WIDTHS
        }
        prices[expert] = bits_price(exact, approximations)
        n_priced[expert] = len(inputs)
    return prices, n_priced


def _rounded(weights: Mapping[str, FloatWeight], width_bits: int) -> dict[str, FloatWeight]:
    """Return an expert whose matrices, but not biases, were rounded to a width."""
    return {
        name: FloatWeight(values=round_trip(weight.values, width_bits))
        if weight.values.ndim == 2
        else weight
        for name, weight in weights.items()
    }
