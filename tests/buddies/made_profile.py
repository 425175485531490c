"""A profile held in memory, with figures that a test can work out by hand."""

from dataclasses import dataclass

import numpy as np
import torch

from moe_tool.artifacts.expert_statistics import ExpertStatistics, RoutingCounts
from moe_tool.artifacts.identity import ModelIdentity
from moe_tool.artifacts.moe_shape import ExpertTensor, MoeShape
from moe_tool.artifacts.router_trace import LayerTrace, TracedTokens
from moe_tool.formats.profile_hdf5 import ProfileHeader
from moe_tool.profiling.expert_probe import ExpertProbe
from moe_tool.profiling.routing_counts import count_routing
from moe_tool.profiling.similarity import router_similarity


@dataclass
class MadeProfile:
    """What build_buddy_map asks of a ProfileReader."""

    header: ProfileHeader
    tokens: TracedTokens
    traces: dict[int, LayerTrace]
    measured: dict[int, ExpertStatistics]
    sha256: str = "ab" * 32

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.traces)

    def trace(self, layer: int) -> LayerTrace:
        return self.traces[layer]

    def statistics(self, layer: int) -> ExpertStatistics:
        return self.measured[layer]


def made_profile(
    outputs: torch.Tensor,
    index: np.ndarray,
    weight: np.ndarray,
    *,
    held_out_outputs: torch.Tensor | None = None,
    layers: tuple[int, ...] = (1,),
) -> MadeProfile:
    """Return a profile of one sequence in-sample and one held out, routed alike in every layer.

    Args:
        outputs: [E, S, H] of all experts on the in-sample tokens.
        index: [S, K] experts chosen by both sequences' tokens.
        weight: [S, K] their gate weights.
        held_out_outputs: [E, S, H]; None: the same.
        layers: decoder-layer indices.
    """
    n_experts, n_tokens, hidden = outputs.shape
    top_k = index.shape[1]
    shape = MoeShape(
        model_type="mixtral",
        n_decoder_layers=max(layers) + 1,
        layers=layers,
        experts=n_experts,
        top_k=top_k,
        hidden=hidden,
        vocabulary=100,
        dtype="float32",
        expert_tensors=(ExpertTensor(name="down_proj", shape=(hidden, 4)),),
    )
    header = ProfileHeader(
        identity=ModelIdentity(name="made", model_type="mixtral", quick="cd" * 32),
        shape=shape,
        tokenizer_sha256="ef" * 32,
        sources=("made",),
        seed=0,
        seq_len=n_tokens,
        holdout=0.5,
        tool_version="0",
    )
    tokens = TracedTokens(
        ids=np.zeros((2, n_tokens), np.int32),
        domain=np.zeros(2, np.int16),
        document=np.zeros((2, n_tokens), np.int32),
        held_out=np.array([False, True]),
        domains=("made",),
    )
    logits = np.random.default_rng(0).normal(size=(2 * n_tokens, n_experts)).astype(np.float16)
    trace = LayerTrace(
        top_k_index=np.tile(index, (2, 1)).astype(np.uint16),
        # Held-out gates are even: they must not move the threshold.
        top_k_weight=np.concatenate([weight, np.full_like(weight, 1 / top_k)]).astype(np.float16),
        router_logits=logits,
        selection_score=None,
        next_gate_index=np.zeros((0, 2 * n_tokens, top_k), np.uint16),
    )
    statistics = _statistics(outputs, held_out_outputs, index, weight, logits)
    return MadeProfile(
        header=header,
        tokens=tokens,
        traces=dict.fromkeys(layers, trace),
        measured=dict.fromkeys(layers, statistics),
    )


def _statistics(
    outputs: torch.Tensor,
    held_out_outputs: torch.Tensor | None,
    index: np.ndarray,
    weight: np.ndarray,
    logits: np.ndarray,
) -> ExpertStatistics:
    n_experts, n_tokens, _ = outputs.shape
    gate = np.zeros((n_tokens, n_experts), np.float32)
    np.put_along_axis(gate, index.astype(np.int64), weight.astype(np.float32), axis=1)
    routed = np.zeros((n_tokens, n_experts), bool)
    np.put_along_axis(routed, index.astype(np.int64), True, axis=1)
    probe, held_out = ExpertProbe(n_experts=n_experts), ExpertProbe(n_experts=n_experts)
    probe.add_block(outputs, routed=routed, gate=gate)
    held_out.add_block(
        outputs if held_out_outputs is None else held_out_outputs, routed=routed, gate=gate
    )
    counts: RoutingCounts = count_routing(
        top_k_index=index,
        top_k_weight=weight,
        domain_of_token=np.zeros(n_tokens, np.int16),
        sequence_of_token=np.zeros(n_tokens, np.int64),
        n_experts=n_experts,
        n_domains=1,
    )
    measured = probe.finish()
    return ExpertStatistics(
        in_sample=counts,
        held_out=counts,
        probe=measured,
        probe_held_out=held_out.finish(),
        eps_buddy_transferred=held_out.price_of_scales(measured.scale),
        eps_bits=np.zeros((n_experts, 5), np.float32),
        eps_bits_n_tokens=np.zeros(n_experts, np.int64),
        router_similarity=router_similarity(logits[:n_tokens]),
        sensitivity=1.0,
        sensitivity_n_tokens=256,
    )
