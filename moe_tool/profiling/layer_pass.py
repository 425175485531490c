"""Pass of all batches through one layer, with its experts in memory and its routing recorded."""

from collections.abc import Mapping

import numpy as np
import torch

from moe_tool.artifacts.expert_statistics import ExpertStatistics
from moe_tool.artifacts.router_trace import LayerTrace
from moe_tool.errors import CorruptArtifactError, UnsupportedModelError
from moe_tool.models.architecture import OpenedModel
from moe_tool.models.layer_experts import LayerExperts
from moe_tool.models.layer_stream import LayerStream, StreamedLayer
from moe_tool.models.moe_layers import MoeLayerModules
from moe_tool.models.router_rule import RouterRule, router_rule
from moe_tool.models.skeleton import LayerCall
from moe_tool.profiling.layer_recording import LayerRecording
from moe_tool.profiling.layer_statistics import measure_layer
from moe_tool.quantization.weights import FloatWeight
from moe_tool.text.sequences import TokenSequences

NEXT_GATES = 3
"""Following MoE layers whose routers are applied to a layer's input."""
RELATIVE_NOISE = 0.1
"""Norm of the noise relative to each token's expert output: small enough for KL to be quadratic,
large enough for float32"""


class LayerPass:
    """State of the current layer; call `begin`, then `forward` for every batch, then `measure`."""

    def __init__(
        self,
        opened: OpenedModel,
        stream: LayerStream,
        tokens: TokenSequences,
        *,
        sample_rows: np.ndarray,
        probe_bytes: int,
    ) -> None:
        """Become the experts function of the stream.

        Args:
            tokens: all T tokens that will be recorded.
            sample_rows: [n] ascending rows (tokens) whose layer inputs the probe uses.
            probe_bytes: room for one block of all experts' outputs.
        """
        self._opened = opened
        self._stream = stream
        self._tokens = tokens
        self._sample_rows = sample_rows
        self._probe_bytes = probe_bytes
        self._layer: StreamedLayer | None = None
        self._experts: Mapping[int, Mapping[str, FloatWeight]] = {}
        self._recording: LayerRecording | None = None
        self._rule: RouterRule | None = None  # where top-k is of other scores than the logits
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
        shape = self._opened.shape
        self._experts = LayerExperts(self._opened.experts, shape, layer.layer)
        later = [modules for modules in self._stream.moe_layers if modules.layer > layer.layer]
        self._next = [modules for modules in later[:NEXT_GATES] if not modules.chooses_by_token]
        rule = router_rule(layer.moe, self._stream.model.config)
        self._rule = rule if rule is not None and rule.scores_differ else None
        self._recording = LayerRecording(
            shape,
            n_tokens=self._tokens.ids.size,
            n_next_gates=len(self._next),
            has_selection_scores=self._rule is not None,
            sample_rows=self._sample_rows,
        )

    def forward(
        self, hidden: torch.Tensor, *, first_row: int | None = None, disturbed: bool = False
    ) -> torch.Tensor:
        """Return the layer's output, [B, S, H]; record its routing from `first_row` on if given.

        `disturbed`: with noise on the sum of its experts.
        """
        assert self._layer is not None
        self._first_row, self._disturbed = first_row, disturbed
        return self._layer.forward(hidden)

    def measure(self) -> tuple[LayerTrace, ExpertStatistics]:
        """Return the layer's trace and statistics, once all batches went through.

        Raises:
            CorruptArtifactError: an expert puts out numbers that are not finite.
        """
        layer, recording = self._layer, self._recording
        assert layer is not None and layer.moe is not None and recording is not None
        try:
            statistics = measure_layer(
                layer.moe.experts,
                self._experts,
                recording,
                self._tokens,
                probe_bytes=self._probe_bytes,
            )
        except CorruptArtifactError as error:
            raise CorruptArtifactError(
                f"layer {layer.layer}: {error.message}", hint=error.hint
            ) from error
        return recording.trace, statistics

    def _answer(self, call: LayerCall) -> torch.Tensor:
        output = call.run_experts(
            lambda wanted: ((expert, self._experts[expert]) for expert in wanted)
        )
        if self._disturbed:
            seed = self._tokens.seed * 1_000_003 + call.layer
            return _disturb(output, generator=torch.Generator().manual_seed(seed))
        if self._first_row is not None:
            self._record(call, self._first_row)
        return output

    def _record(self, call: LayerCall, first_row: int) -> None:
        assert self._recording is not None and call.router_logits is not None
        n_choices, n_experts = call.router_logits.shape[1], self._opened.shape.experts
        if n_choices != n_experts:
            raise UnsupportedModelError(
                f"{self._opened.shape.model_type!r} is not profiled: its routers choose among "
                f"{n_choices}, and it has {n_experts} experts",
                hint="pack it without a profile; the bundle runs exactly",
            )
        self._recording.add(
            first_row,
            call,
            score=None if self._rule is None else self._rule.selection_scores(call.router_logits),
            next_index=[modules.route(call.routed_hidden).index for modules in self._next],
        )


def _disturb(output: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
    """Return the output plus noise in a random direction, RELATIVE_NOISE times each token's norm.

    Args:
        output: [T, H] float32, sum of a MoE layer's routed experts.
    """
    noise = torch.randn(output.shape, generator=generator)
    size: torch.Tensor = (
        RELATIVE_NOISE * output.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    )
    disturbed: torch.Tensor = output + noise * size
    return disturbed
