"""Second pass of a profile's tokens through the model, which yields every expert's inputs."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_tool.artifacts.router_trace import TracedTokens
from moe_tool.budget.table_choice import AUTO_ROWS, RowsRequest
from moe_tool.models.architecture import OpenedModel
from moe_tool.models.layer_experts import LayerExperts
from moe_tool.models.layer_stream import LayerStream, StreamedLayer
from moe_tool.models.output_divergence import total_divergence
from moe_tool.models.skeleton import LayerCall
from moe_tool.packing.pack_memory import MOST_HIDDEN_BYTES
from moe_tool.quantization.weights import AnyWeight, ExpertWeights, FloatWeight
from moe_tool.quantizers.inputs import ExpertInputs

_MAX_TOKENS = 32768
_BATCH_TOKENS = 2048
_MIN_ROWS = 8
"""Routed tokens below which an expert is measured on all tokens"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSample:
    """Inputs of one expert: n tokens to fit on, m held-out ones to measure on."""

    module: Any
    """The experts module of transformers"""
    tensors: Mapping[str, torch.Tensor]
    """The expert's weights, in the checkpoint's dtype"""
    fitted_on: torch.Tensor
    """[n, H] float32 in-sample inputs"""
    measured_on: torch.Tensor
    """[m, H] float32 held-out inputs"""
    is_own: bool
    """Whether the tokens are those routed to the expert; False: too few were, and all are used"""

    @property
    def inputs(self) -> ExpertInputs:
        """The in-sample inputs, as quantizers take them."""
        return ExpertInputs(self.module, self.tensors, self.fitted_on)


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratedLayer:
    """One MoE layer with its experts in memory, valid until the next one is yielded."""

    layer: int
    module: Any
    experts: Mapping[int, Mapping[str, FloatWeight]]
    inputs: torch.Tensor
    """[T, H] float32 inputs of the experts"""
    index: torch.Tensor
    """[T, K] int64 expert ids"""
    held_out: torch.Tensor
    """[T] bool: True for held-out tokens"""
    disturb: Callable[[Mapping[int, ExpertWeights]], None]
    """Function that continues the watched sequences with other weights for some of this layer's
    experts; see `CalibratedModel.divergences`"""

    def sample(self, expert: int, *, most_measured: int) -> ExpertSample:
        """Return an expert's inputs, or all experts' if few tokens are routed to it."""
        wanted = (self.index == expert).any(dim=1)

        def rows(part: torch.Tensor) -> tuple[torch.Tensor, bool]:
            own = torch.nonzero(wanted & part).flatten()
            is_own = len(own) >= _MIN_ROWS
            return (own if is_own else torch.nonzero(part).flatten()), is_own

        fitted, is_own = rows(~self.held_out)
        measured, is_measured_on_own = rows(self.held_out)
        step = max(1, -(-len(measured) // most_measured))
        return ExpertSample(
            module=self.module,
            tensors={name: each.values for name, each in self.experts[expert].items()},
            fitted_on=self.inputs[fitted],
            measured_on=self.inputs[measured[::step]],
            is_own=is_own and is_measured_on_own,
        )


class CalibratedModel:
    """Model evaluated layer by layer on tokens of its profile.

    Memory holds one layer's experts and twice the hidden states of the tokens, which are a sample
    of the profile's sequences if all would take too much.
    """

    def __init__(
        self,
        folder: Path,
        opened: OpenedModel,
        tokens: TracedTokens,
        *,
        hidden_bytes: int = MOST_HIDDEN_BYTES,
        rows: RowsRequest = AUTO_ROWS,
    ) -> None:
        """Load the tensors outside the layers.

        Args:
            hidden_bytes: limit of the hidden states carried from layer to layer.
            rows: embedding tables of which only rows are read.
        """
        self._hidden_bytes = hidden_bytes
        self._opened = opened
        self._tokens = tokens
        self._stream = LayerStream(folder, opened.checkpoint, rows=rows)
        self._stream.set_experts_function(self._answer)
        self._calls: list[LayerCall] = []
        self._experts: Mapping[int, Mapping[str, FloatWeight]] = {}
        self._instead: Mapping[int, ExpertWeights] = {}
        """Expert -> weights in its place"""
        self._watched: list[torch.Tensor] = []
        """Hidden states of the watched sequences: undisturbed, then one for each `disturb`"""

    def watch(self, n_tokens: int) -> None:
        """Watch sequences of about `n_tokens` tokens, for `disturb`; call it before `layers`."""
        in_sample = np.flatnonzero(~self._tokens.held_out)
        count = max(1, min(len(in_sample), n_tokens // self._tokens.ids.shape[1]))
        rows = in_sample[np.linspace(0, len(in_sample) - 1, count).astype(np.int64)]
        ids = torch.from_numpy(self._tokens.ids[rows].astype(np.int64))
        self._watched = [self._stream.initial_hidden(ids)]

    def layers(self, *, last: int | None = None) -> Iterator[CalibratedLayer]:
        """Yield the MoE layers with their experts' inputs.

        Args:
            last: last decoder layer to evaluate; None: all.
        """
        chosen = _choose(
            self._tokens, hidden=self._opened.shape.hidden, hidden_bytes=self._hidden_bytes
        )
        ids = torch.from_numpy(self._tokens.ids[chosen].astype(np.int64))  # [N, S]
        held_out = torch.from_numpy(np.repeat(self._tokens.held_out[chosen], ids.shape[1]))
        batches = torch.split(ids, max(1, _BATCH_TOKENS // ids.shape[1]))
        hidden = [self._stream.initial_hidden(batch) for batch in batches]
        for layer in self._stream.layers():
            if last is not None and layer.layer > last:
                return
            self._calls.clear()
            self._experts = {}
            if layer.moe is not None:
                self._experts = LayerExperts(self._opened.experts, self._opened.shape, layer.layer)
            for at, states in enumerate(hidden):
                hidden[at] = layer.forward(states)
            calls, self._calls = self._calls, []
            untouched = self._watched[0] if self._watched else None
            self._watched = [layer.forward(states) for states in self._watched]
            self._calls.clear()
            if layer.moe is not None:
                yield CalibratedLayer(
                    layer=layer.layer,
                    module=layer.moe.experts,
                    experts=self._experts,
                    inputs=torch.cat([call.hidden for call in calls]).float(),
                    index=torch.cat([call.index for call in calls]),
                    held_out=held_out,
                    disturb=partial(self._disturb, layer, untouched),
                )

    def divergences(self) -> list[float]:
        """Return the divergence of the output for each `disturb` in order, nats per token, once
        `layers` has ended."""
        exact, *disturbed = self._watched
        totals = [0.0] * len(disturbed)
        n_tokens = 0
        for sequence in range(len(exact)):
            truth = self._stream.logits(exact[sequence : sequence + 1])[0]
            n_tokens += len(truth)
            for at, states in enumerate(disturbed):
                found = self._stream.logits(states[sequence : sequence + 1])[0]
                totals[at] += total_divergence(truth, found)
        return [total / n_tokens for total in totals]

    def _disturb(
        self,
        layer: StreamedLayer,
        untouched: torch.Tensor | None,
        instead: Mapping[int, ExpertWeights],
    ) -> None:
        assert untouched is not None, "nothing is watched"
        self._instead = instead
        try:
            self._watched.append(layer.forward(untouched))
        finally:
            self._instead = {}
            self._calls.clear()

    def _answer(self, call: LayerCall) -> torch.Tensor:
        self._calls.append(call)
        return call.run_experts(self._supply)

    def _supply(self, wanted: list[int]) -> Iterator[tuple[int, Mapping[str, AnyWeight]]]:
        for expert in wanted:
            if expert in self._instead:
                yield expert, self._instead[expert]
                continue
            yield expert, self._experts[expert]


def _choose(tokens: TracedTokens, *, hidden: int, hidden_bytes: int) -> np.ndarray:
    """Return sequences spread over the profile, from both parts in proportion."""
    n_sequences, seq_len = tokens.ids.shape
    most = max(1, min(_MAX_TOKENS, hidden_bytes // (4 * hidden)) // seq_len)
    parts = [np.flatnonzero(tokens.held_out == part) for part in (False, True)]
    share = min(1.0, most / n_sequences)
    kept = [
        part[np.linspace(0, len(part) - 1, max(1, round(share * len(part)))).astype(np.int64)]
        for part in parts
        if len(part)
    ]
    chosen: np.ndarray = np.unique(np.concatenate(kept))
    return chosen
