"""Recording of one MoE layer's trace, batch by batch."""

import numpy as np
import torch

from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.artifacts.router_trace import LayerTrace
from moe_tool.models.skeleton import LayerCall

# Larger logits would become infinite in float16; a softmax cannot tell the difference.
_FLOAT16_MAX = 65504.0


class LayerRecording:
    """Trace of T tokens, allocated at once, and the layer's input on the probe's tokens."""

    def __init__(
        self,
        shape: MoeShape,
        *,
        n_tokens: int,
        n_next_gates: int,
        has_selection_scores: bool,
        sample_rows: np.ndarray,
    ) -> None:
        """Allocate the arrays.

        Args:
            n_next_gates: following MoE layers whose routers are applied to this layer's input.
            has_selection_scores: whether top-k is taken of other scores than the logits.
            sample_rows: [n] ascending rows (tokens) whose layer input is kept for the probe.
        """
        by_choice, by_expert = (n_tokens, shape.top_k), (n_tokens, shape.experts)
        self.trace = LayerTrace(
            top_k_index=np.zeros(by_choice, np.uint16),
            top_k_weight=np.zeros(by_choice, np.float16),
            router_logits=np.zeros(by_expert, np.float16),
            selection_score=np.zeros(by_expert, np.float16) if has_selection_scores else None,
            next_gate_index=np.zeros((n_next_gates, *by_choice), np.uint16),
        )
        self.sample_rows = sample_rows
        self.sample_input = torch.zeros(len(sample_rows), shape.expert_hidden)  # [n, H]

    def add(
        self,
        first_row: int,
        call: LayerCall,
        *,
        score: torch.Tensor | None,
        next_index: list[torch.Tensor],
    ) -> None:
        """Record one call of T' tokens; score [T', E]; next_index [T', K] for each next gate."""
        assert call.router_logits is not None
        rows = slice(first_row, first_row + len(call.hidden))
        self.trace.top_k_index[rows] = call.index.numpy()
        self.trace.top_k_weight[rows] = call.weight.numpy()
        self.trace.router_logits[rows] = _within_float16(call.router_logits)
        if self.trace.selection_score is not None:
            assert score is not None
            self.trace.selection_score[rows] = _within_float16(score)
        for depth, wanted in enumerate(next_index):
            self.trace.next_gate_index[depth, rows] = wanted.numpy()
        first, last = np.searchsorted(self.sample_rows, (rows.start, rows.stop))
        self.sample_input[first:last] = call.hidden[self.sample_rows[first:last] - rows.start]


def _within_float16(logits: torch.Tensor) -> np.ndarray:
    return logits.float().clamp(-_FLOAT16_MAX, _FLOAT16_MAX).numpy()
