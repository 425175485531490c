"""Pass of all batches through one layer, with its experts in memory and its routing recorded."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from moe_tool.artifacts.expert_statistics import ExpertStatistics
from moe_tool.artifacts.router_trace import LayerTrace
from moe_tool.errors import CorruptArtifactError, UnsupportedModelError
from moe_tool.models.architecture import OpenedModel
from moe_tool.models.layer_stream import LayerStream, StreamedLayer
from moe_tool.models.moe_layers import MoeLayerModules
from moe_tool.models.router_rule import RouterRule, router_rule
from moe_tool.models.skeleton import LayerCall
from moe_tool.profiling.layer_recording import LayerRecording
from moe_tool.profiling.layer_statistics import MeasuredTokens, measure_layer
from moe_tool.profiling.sensitivity import disturb
from moe_tool.quantization.weights import FloatWeight

NEXT_GATES = 3
"""Following MoE layers whose routers are applied to a layer's input."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassPlan:
    """Settings of all layers' passes. T tokens in N sequences."""

    n_tokens: int
    sample_rows: np.ndarray
    """[n] ascending rows (tokens) whose layer inputs the probe uses"""
    domain_of_sequence: np.ndarray
    """[N] domain index of each sequence"""
    held_out_sequence: np.ndarray
    """[N] bool: True for held-out sequences"""
    n_domains: int
    seq_len: int
    probe_bytes: int
    seed: int


class LayerPass:
    """State of the current layer; call `begin`, then `forward` for every batch, then `measure`."""

    def __init__(self, opened: OpenedModel, stream: LayerStream, plan: PassPlan) -> None:
        """Become the experts function of the stream."""
        self._opened = opened
        self._stream = stream
        self._plan = plan
        self._layer: StreamedLayer | None = None
        self._experts: dict[int, dict[str, FloatWeight]] = {}
        self._recording: LayerRecording | None = None
        self._rule: RouterRule | None = None
        self._next: list[MoeLayerModules] = []
        self._first_row: int | None = None
        self._disturbed = False
        stream.set_experts_function(self._answer)

    def begin(self, layer: StreamedLayer) -> None:
        """Read the layer's experts and drop those of the previous one."""
        self._experts = {}
        self._recording = None
        self._layer = layer
        if layer.moe is None:
            return
        shape, plan = self._opened.shape, self._plan
        for expert in range(shape.experts):
            tensors = self._opened.experts.read(layer.layer, expert)
            self._experts[expert] = {n: FloatWeight(values=t) for n, t in tensors.items()}
        later = [modules for modules in self._stream.moe_layers if modules.layer > layer.layer]
        self._next = [modules for modules in later[:NEXT_GATES] if not modules.chooses_by_token]
        self._rule = router_rule(layer.moe, self._stream.model.config)
        self._recording = LayerRecording(
            shape,
            n_tokens=plan.n_tokens,
            n_next_gates=len(self._next),
            has_selection_scores=self._rule is not None and self._rule.scores_differ,
            sample_rows=plan.sample_rows,
        )

    def forward(self, hidden: torch.Tensor, *, first_row: int | None = None) -> torch.Tensor:
        """Return the layer's output, recording its routing if `first_row` is given.

        Args:
            hidden: [B, S, H].
            first_row: row of the first token in the trace; None: do not record.
        """
        assert self._layer is not None
        self._first_row = first_row
        return self._layer.forward(hidden)

    def forward_disturbed(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the layer's output with noise on the sum of its experts."""
        self._disturbed = True
        try:
            return self.forward(hidden)
        finally:
            self._disturbed = False

    def measure(self) -> tuple[LayerTrace, ExpertStatistics]:
        """Return the layer's trace and statistics, once all batches went through.

        Raises:
            CorruptArtifactError: an expert puts out numbers that are not finite.
        """
        assert (
            self._layer is not None and self._layer.moe is not None and self._recording is not None
        )
        plan = self._plan
        trace = self._recording.trace()
        tokens = MeasuredTokens(
            domain=np.repeat(plan.domain_of_sequence, plan.seq_len),
            sequence=np.repeat(np.arange(len(plan.domain_of_sequence)), plan.seq_len),
            held_out=np.repeat(plan.held_out_sequence, plan.seq_len),
            n_domains=plan.n_domains,
            sample_rows=plan.sample_rows,
            sample_input=self._recording.sample_input,
        )
        try:
            statistics = measure_layer(
                self._layer.moe.experts, self._experts, trace, tokens, probe_bytes=plan.probe_bytes
            )
        except CorruptArtifactError as error:
            where = f"layer {self._layer.layer}"
            raise CorruptArtifactError(f"{where}: {error.message}", hint=error.hint) from error
        return trace, statistics

    def _answer(self, call: LayerCall) -> torch.Tensor:
        output = call.run_experts(self._supply)
        if self._disturbed:
            seed = self._plan.seed * 1_000_003 + call.layer
            return disturb(output, generator=torch.Generator().manual_seed(seed))
        if self._first_row is not None:
            self._record(call, self._first_row)
        return output

    def _supply(self, wanted: list[int]) -> Iterator[tuple[int, Mapping[str, FloatWeight]]]:
        for expert in wanted:
            yield expert, self._experts[expert]

    def _record(self, call: LayerCall, first_row: int) -> None:
        assert self._recording is not None and call.router_logits is not None
        n_choices, n_experts = call.router_logits.shape[1], self._opened.shape.experts
        if n_choices != n_experts:
            raise UnsupportedModelError(
                f"{self._opened.shape.model_type!r} is not profiled: its routers choose among "
                f"{n_choices}, and it has {n_experts} experts",
                hint="pack it without a profile; the bundle runs exactly",
            )
        scores = None
        if self._rule is not None and self._rule.scores_differ:
            scores = self._rule.selection_scores(call.router_logits)
        self._recording.add(
            first_row,
            hidden=call.hidden,
            index=call.index,
            weight=call.weight,
            logits=call.router_logits,
            score=scores,
            next_index=[modules.route(call.routed_hidden).index for modules in self._next],
        )
