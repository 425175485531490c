"""Recording of one MoE layer's trace, batch by batch."""

import numpy as np
import torch

from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.artifacts.router_trace import LayerTrace

# Larger logits would become infinite in float16; a softmax cannot tell the difference.
_FLOAT16_MAX = 65504.0


class LayerRecording:
    """Preallocated arrays for T tokens, and the layer's input on the probe's tokens."""

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
            shape: the model's.
            n_tokens: T.
            n_next_gates: following MoE layers whose routers are applied to this layer's input.
            has_selection_scores: whether top-k is taken of other scores than the logits.
            sample_rows: [n] ascending rows (tokens) whose layer input is kept for the probe.
        """
        k, e = shape.top_k, shape.experts
        self._index = np.zeros((n_tokens, k), np.uint16)
        self._weight = np.zeros((n_tokens, k), np.float16)
        self._logits = np.zeros((n_tokens, e), np.float16)
        self._score = np.zeros((n_tokens, e), np.float16) if has_selection_scores else None
        self._next = np.zeros((n_next_gates, n_tokens, k), np.uint16)
        self._sample_rows = sample_rows
        self.sample_input = torch.zeros(len(sample_rows), shape.expert_hidden)  # [n, H]

    def add(
        self,
        first_row: int,
        *,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weight: torch.Tensor,
        logits: torch.Tensor,
        score: torch.Tensor | None,
        next_index: list[torch.Tensor],
    ) -> None:
        """Record one call: hidden [T', H], index and weight [T', K], logits and score [T', E]."""
        rows = slice(first_row, first_row + len(hidden))
        self._index[rows] = index.numpy()
        self._weight[rows] = weight.numpy()
        self._logits[rows] = logits.float().clamp(-_FLOAT16_MAX, _FLOAT16_MAX).numpy()
        if self._score is not None:
            assert score is not None
            self._score[rows] = score.float().clamp(-_FLOAT16_MAX, _FLOAT16_MAX).numpy()
        for depth, wanted in enumerate(next_index):
            self._next[depth, rows] = wanted.numpy()
        first, last = np.searchsorted(self._sample_rows, (rows.start, rows.stop))
        self.sample_input[first:last] = hidden[self._sample_rows[first:last] - rows.start]

    def trace(self) -> LayerTrace:
        """Return the arrays as a trace."""
        return LayerTrace(
            top_k_index=self._index,
            top_k_weight=self._weight,
            router_logits=self._logits,
            selection_score=self._score,
            next_gate_index=self._next,
        )
