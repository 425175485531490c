"""The profile's tokens once more through the model, for what is fitted to an expert's inputs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_tool.artifacts.router_trace import TracedTokens
from moe_tool.experts.combine import run_experts
from moe_tool.models.architecture import OpenedModel
from moe_tool.models.layer_stream import LayerStream
from moe_tool.models.skeleton import LayerCall
from moe_tool.quantization.weights import FloatWeight

_HIDDEN_BYTES = 128 * 2**20
"""Of the hidden states that are carried from layer to layer, and again of one layer's inputs"""
_MAX_TOKENS = 32768
_BATCH_TOKENS = 2048
_MIN_ROWS = 8
"""An expert with fewer tokens of its own is measured on all of them"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSample:
    """What one expert was given. n tokens to fit on, m held-out ones to measure on."""

    module: Any
    """The experts module of transformers"""
    tensors: Mapping[str, torch.Tensor]
    """The expert's weights, in the checkpoint's dtype"""
    fitted_on: torch.Tensor
    """[n, H] float32"""
    measured_on: torch.Tensor
    """[m, H] float32"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratedLayer:
    """One MoE layer with its experts in memory, until the next one is asked for."""

    layer: int
    module: Any
    experts: Mapping[int, Mapping[str, torch.Tensor]]
    inputs: torch.Tensor
    """[T, H] float32"""
    index: torch.Tensor
    """[T, K] int64"""
    held_out: torch.Tensor
    """[T] bool"""

    def sample(self, expert: int, *, most_measured: int) -> ExpertSample:
        """Return what an expert was given; of an expert that is wanted too rarely, what all were.

        Args:
            expert: of the layer.
            most_measured: held-out tokens at most.
        """
        wanted = (self.index == expert).any(dim=1)

        def rows(part: torch.Tensor) -> torch.Tensor:
            own = torch.nonzero(wanted & part).flatten()
            return own if len(own) >= _MIN_ROWS else torch.nonzero(part).flatten()

        measured = rows(self.held_out)
        step = max(1, -(-len(measured) // most_measured))
        return ExpertSample(
            module=self.module,
            tensors=self.experts[expert],
            fitted_on=self.inputs[rows(~self.held_out)],
            measured_on=self.inputs[measured[::step]],
        )


def calibrated_layers(
    folder: Path, opened: OpenedModel, tokens: TracedTokens
) -> Iterator[CalibratedLayer]:
    """Yield the MoE layers one after the other, with what their experts are given.

    One layer's experts are in memory at a time, and twice the hidden states of the tokens: a
    sample of the profile's sequences where all would take too much.

    Args:
        folder: of the checkpoint.
        opened: the same checkpoint.
        tokens: of its profile.
    """
    chosen = _choose(tokens, hidden=opened.shape.hidden)
    ids = torch.from_numpy(tokens.ids[chosen].astype(np.int64))  # [N, S]
    held_out = torch.from_numpy(np.repeat(tokens.held_out[chosen], ids.shape[1]))
    stream = LayerStream(folder, opened.checkpoint)
    batches = torch.split(ids, max(1, _BATCH_TOKENS // ids.shape[1]))
    hidden = [stream.initial_hidden(batch) for batch in batches]
    calls: list[LayerCall] = []
    experts: dict[int, dict[str, torch.Tensor]] = {}

    def answer(call: LayerCall) -> torch.Tensor:
        calls.append(call)
        return run_experts(call.module, call.hidden, call.index, call.weight, supply)

    def supply(wanted: list[int]) -> Iterator[tuple[int, Mapping[str, FloatWeight]]]:
        for expert in wanted:
            found = experts[expert]
            yield expert, {name: FloatWeight(values=value) for name, value in found.items()}

    stream.set_experts_function(answer)
    for layer in stream.layers():
        calls.clear()
        experts.clear()
        if layer.moe is not None:
            for expert in range(opened.shape.experts):
                experts[expert] = opened.experts.read(layer.layer, expert)
        for at, states in enumerate(hidden):
            hidden[at] = layer.forward(states)
        if layer.moe is not None:
            yield CalibratedLayer(
                layer=layer.layer,
                module=layer.moe.experts,
                experts=experts,
                inputs=torch.cat([call.hidden for call in calls]).float(),
                index=torch.cat([call.index for call in calls]),
                held_out=held_out,
            )


def _choose(tokens: TracedTokens, *, hidden: int) -> np.ndarray:
    """Sequences spread over the profile, of both parts in their proportion."""
    n_sequences, seq_len = tokens.ids.shape
    most = max(1, min(_MAX_TOKENS, _HIDDEN_BYTES // (4 * hidden)) // seq_len)
    parts = [np.flatnonzero(tokens.held_out == part) for part in (False, True)]
    share = min(1.0, most / n_sequences)
    kept = [
        part[np.linspace(0, len(part) - 1, max(1, round(share * len(part)))).astype(np.int64)]
        for part in parts
        if len(part)
    ]
    chosen: np.ndarray = np.unique(np.concatenate(kept))
    return chosen
