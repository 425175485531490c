"""Routing report: caching and prefetching figures of a profile, layer by layer."""

import numpy as np

from moe_tool.artifacts.expert_statistics import ExpertStatistics
from moe_tool.artifacts.router_trace import LayerTrace, TracedTokens
from moe_tool.artifacts.routing_report import LayerRouting, NextGate, RoutingReport
from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.profiling.hot_set_coverage import (
    hot_set_coverages,
    loads_by_sequence,
    mean_hot_sets,
)
from moe_tool.profiling.next_gate import gate_prediction, mean_next_gates
from moe_tool.profiling.reuse_distance import merged, reuse_histogram
from moe_tool.profiling.union_growth import mean_union_growth, union_growth
from moe_tool.progress import SILENT, Progress

Prediction = tuple[int, np.ndarray]
"""A layer, and [D, T, K] experts that the next D MoE layers' routers choose on its input"""


def report_routing(profile: ProfileReader, progress: Progress = SILENT) -> RoutingReport:
    """Return the report of a profile.

    Memory holds one layer, the predictions of the last three, and two or four bytes per held-out
    use.

    Raises:
        CorruptArtifactError: a number in the profile is out of range.
    """
    tokens, shape = profile.tokens, profile.header.shape
    n_ids = len(shape.layers) * shape.experts
    held_out_uses = np.zeros(
        (int(tokens.held_out.sum()) * tokens.ids.shape[1], len(shape.layers), shape.top_k),
        np.uint16 if n_ids <= 2**16 else np.int32,
    )
    layers: list[LayerRouting] = []
    named: list[Prediction] = []  # the nearest layer first
    progress.begin("report on layers", len(shape.layers), "layers")
    for position, layer in enumerate(shape.layers):
        trace = profile.trace(layer)
        held_out = trace.top_k_index[_rows(tokens)].astype(held_out_uses.dtype)
        held_out_uses[:, position] = held_out + position * shape.experts
        layers.append(_layer(layer, trace, profile.statistics(layer), tokens, named, shape.experts))
        named = [(layer, trace.next_gate_index), *named][:3]
        progress.advance()
    progress.end()
    return RoutingReport(
        domains=tokens.domains,
        hot_sets=mean_hot_sets([one.hot_sets for one in layers], tokens.domains),
        next_gate=mean_next_gates([one.next_gate for one in layers]),
        union_growth=mean_union_growth([one.union_growth for one in layers]),
        reuse=reuse_histogram(held_out_uses.reshape(-1), n_experts=n_ids),
        reuse_within_layer=merged([one.reuse for one in layers]),
        layers=tuple(layers),
    )


def _layer(
    layer: int,
    trace: LayerTrace,
    statistics: ExpertStatistics,
    tokens: TracedTokens,
    named: list[Prediction],
    n_experts: int,
) -> LayerRouting:
    chosen = trace.top_k_index.reshape(*tokens.ids.shape, -1)  # [N, S, K]
    held_out = chosen[tokens.held_out]
    return LayerRouting(
        layer=layer,
        hot_sets=hot_set_coverages(
            statistics.in_sample,
            statistics.held_out,
            loads_by_sequence(held_out, n_experts),
            tokens.domains,
        ),
        next_gate=tuple(
            _next_gate(depth, source, trace, tokens, n_experts)
            for depth, source in enumerate(named, start=1)
        ),
        union_growth=union_growth(chosen, n_experts=n_experts),
        reuse=reuse_histogram(held_out.reshape(-1), n_experts=n_experts),
    )


def _next_gate(
    depth: int, source: Prediction, trace: LayerTrace, tokens: TracedTokens, n_experts: int
) -> NextGate:
    rows, (from_layer, named) = _rows(tokens), source
    in_sample, held_out = (
        gate_prediction(
            named[depth - 1, part],
            trace.top_k_index[part],
            trace.top_k_weight[part],
            n_experts=n_experts,
        )
        for part in (~rows, rows)
    )
    return NextGate(depth=depth, from_layer=from_layer, in_sample=in_sample, held_out=held_out)


def _rows(tokens: TracedTokens) -> np.ndarray:
    """Return [T] bool: True for the held-out rows of a trace."""
    return np.repeat(tokens.held_out, tokens.ids.shape[1])
