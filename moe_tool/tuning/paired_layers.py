"""Exact model and bundle side by side: the same tokens through both, layer by layer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_tool.experts.combine import run_experts
from moe_tool.models.architecture import OpenedModel
from moe_tool.models.layer_experts import LayerExperts
from moe_tool.models.layer_stream import LayerStream, StreamedLayer
from moe_tool.models.moe_layers import unsupported
from moe_tool.models.skeleton import LayerCall
from moe_tool.quantization.weights import AnyWeight, ExpertWeights
from moe_tool.tuning.tune_layer import LayerText

BATCH_TOKENS = 2048
"""Tokens per forward of a decoder layer"""

Weights = Mapping[int, Mapping[str, AnyWeight]]
"""Tensors by expert id; removed experts are missing"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedLayer:
    """Inputs and targets of one MoE layer behind the bundle's layers before it."""

    layer: int
    module: Any
    """Experts module of transformers"""
    text: LayerText
    """Inputs of the bundle's experts, and the outputs that would make the hidden states exact"""
    held_out: torch.Tensor
    """[T] bool: True for held-out tokens"""
    exact_inputs: torch.Tensor
    """[m, H] float32 inputs of the exact model's experts, held-out tokens only"""
    exact_index: torch.Tensor
    """[m, K] int64 expert ids of the exact model, held-out tokens only"""


class PairedModel:
    """Two streams of hidden states through one skeleton; exact experts are in memory one layer at a
    time."""

    def __init__(
        self, folder: Path, opened: OpenedModel, ids: torch.Tensor, held_out: torch.Tensor
    ) -> None:
        """Load the tensors outside the layers.

        Args:
            folder: the checkpoint.
            opened: the same checkpoint.
            ids: [N, S] int64 token ids.
            held_out: [N] bool.
        """
        self._opened = opened
        self._stream = LayerStream(folder, opened.checkpoint)
        self._stream.require_plain("tuning")
        self._stream.set_experts_function(self._answer)
        self._weights: Weights | None = None
        """Experts of the current forward; None: they output zero"""
        self._calls: list[LayerCall] = []
        self._held_out = held_out.repeat_interleave(ids.shape[1])
        batches = torch.split(ids, max(1, BATCH_TOKENS // ids.shape[1]))
        self._exact = [self._stream.initial_hidden(batch) for batch in batches]
        self._bundle = [states.clone() for states in self._exact]
        self._next: Weights = {}
        self._answers_inputs = False

    def layers(self, *, last: int) -> Iterator[PairedLayer]:
        """Yield the MoE layers; call `go_on_with` before asking for the next one.

        Args:
            last: last decoder layer to yield.

        Raises:
            UnsupportedModelError: the layers do more with the experts' output than scale it.
        """
        for layer in self._stream.layers():
            if layer.layer > last:
                return
            if layer.moe is None:
                self._exact = self._through(layer, self._exact)
                self._bundle = self._through(layer, self._bundle)
                self._calls.clear()
                continue
            self._weights = LayerExperts(self._opened.experts, self._opened.shape, layer.layer)
            self._exact = self._through(layer, self._exact)
            inputs, index, _ = self._collected()
            kept = self._held_out
            exact_inputs, exact_index = inputs[kept], index[kept]
            del inputs, index
            self._weights = None
            without = self._through(layer, self._bundle)
            inputs, index, weight = self._collected()
            # The experts' sum with which this layer would end with the exact hidden states.
            share = self._share(layer, without[0])
            target = torch.cat(
                [
                    (exact - other).flatten(0, 1).div_(share)
                    for exact, other in zip(self._exact, without, strict=True)
                ]
            )
            del without
            yield PairedLayer(
                layer=layer.layer,
                module=layer.moe.experts,
                text=LayerText(inputs=inputs, index=index, weight=weight, target=target),
                held_out=self._held_out,
                exact_inputs=exact_inputs,
                exact_index=exact_index,
            )
            del inputs, index, weight, target, exact_inputs, exact_index
            self._weights, self._next = self._next, {}
            self._bundle = self._through(layer, self._bundle)
            self._calls.clear()
            self._weights = None

    def go_on_with(self, weights: Mapping[int, ExpertWeights]) -> None:
        """Use these experts for the bundle's stream in the current layer."""
        self._next = weights

    def _share(self, layer: StreamedLayer, without: torch.Tensor) -> float:
        """Return the layer's factor on the experts' sum, found by letting experts output their
        inputs."""
        self._answers_inputs = True
        found = (layer.forward(self._bundle[0]) - without).flatten(0, 1)
        self._answers_inputs = False
        (call,) = self._calls
        self._calls.clear()
        answered = call.hidden.float()
        if found.shape != answered.shape:
            share = 0.0
        else:
            share = float((found * answered).sum() / answered.square().sum())
        if not share or not torch.allclose(
            found, share * answered, rtol=1e-2, atol=1e-3 * abs(share)
        ):
            raise unsupported(
                self._opened.shape.model_type,
                "its layers do more with the experts' output than scale it",
            )
        return share

    def _through(self, layer: StreamedLayer, hidden: list[torch.Tensor]) -> list[torch.Tensor]:
        return [layer.forward(states) for states in hidden]

    def _collected(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return inputs, expert ids and gate weights of the calls since the last time."""
        calls, self._calls = self._calls, []
        return (
            torch.cat([call.hidden for call in calls]).float(),
            torch.cat([call.index for call in calls]),
            torch.cat([call.weight for call in calls]).float(),
        )

    def _answer(self, call: LayerCall) -> torch.Tensor:
        self._calls.append(call)
        weights = self._weights
        if weights is None:
            return call.hidden if self._answers_inputs else torch.zeros_like(call.hidden)
        n_experts = self._opened.shape.experts
        is_there = torch.tensor([expert in weights for expert in range(n_experts)])
        index, present = call.find_present()
        return run_experts(
            call.module,
            call.hidden,
            index,
            call.weight,
            lambda wanted: ((expert, weights[expert]) for expert in wanted),
            present=is_there[index] if present is None else is_there[index] & present,
        )
