"""A bundle's experts behind other norms and routers, one decoder layer in memory at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager

import torch
import torch.nn.functional as F

from moe_tool.experts.combine import run_experts
from moe_tool.models.layer_experts import LayerExperts
from moe_tool.models.layer_stream import LayerStream, StreamedLayer
from moe_tool.models.skeleton import LayerCall
from moe_tool.quantization.weights import AnyWeight
from moe_tool.tuning.float_weights import FloatPlace, FloatWeights, Values
from moe_tool.tuning.weighed_experts import weighed_experts

HEAD_TOKENS = 128
"""Tokens whose logits are in memory at a time"""

Weights = Mapping[int, Mapping[str, AnyWeight]]
"""Tensors by expert id; removed experts are missing"""


class StreamedBundle:
    """Exact model and bundle in turn through one skeleton."""

    def __init__(
        self,
        stream: LayerStream,
        floats: FloatWeights,
        experts_of: Callable[[int], Weights],
    ) -> None:
        """Keep the checkpoint's stream, the trainable tensors and the bundle's experts by layer."""
        self.stream = stream
        self.floats = floats
        self._experts_of = experts_of
        self._experts: Weights = {}
        self._watch: Callable[[LayerCall], None] | None = None
        stream.set_experts_function(self._answer)

    def exact_states(self, batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the checkpoint's states after the last layer, [B, S, H] by batch.

        Args:
            batches: [B, S] int64 token ids each.
        """
        states = [self.stream.initial_hidden(batch) for batch in batches]
        self._put(self.floats.places, self.floats.start)
        for layer in self.stream.layers():
            if layer.moe is not None:
                self._experts = LayerExperts(self.stream.experts, self.stream.shape, layer.layer)
            states = [layer.forward(each) for each in states]
        self._experts = {}
        return states

    def states(
        self,
        batches: Sequence[torch.Tensor],
        candidates: Sequence[Values],
        *,
        watch: Callable[[LayerCall], None] | None = None,
    ) -> list[list[torch.Tensor]]:
        """Return the bundle's states after the last layer by candidate and batch, [B, S, H] each.

        Every layer is read once.

        Args:
            watch: told of every call of a layer's experts: by layer, candidate and batch.
        """
        self._watch = watch
        found = [[self.stream.initial_hidden(batch) for batch in batches] for _ in candidates]
        for layer in self._layers():
            for at, values in enumerate(candidates):
                self._put(self.floats.of_layer(layer.layer), values)
                found[at] = [layer.forward(each) for each in found[at]]
        self._watch = None
        return found

    def divergence(self, exact: torch.Tensor, states: torch.Tensor, values: Values) -> torch.Tensor:
        """Return KL(exact || bundle) of every prediction, [B, S] nats.

        Args:
            exact: [B, S, H] of `exact_states`.
            states: [B, S, H] of `states`, under `values`.
        """
        found = [self._head_divergence(one, other, values) for one, other in _pieces(exact, states)]
        return torch.cat(found).reshape(exact.shape[:2])

    def gradients(
        self, ids: torch.Tensor, exact: torch.Tensor, values: Values
    ) -> tuple[float, dict[str, torch.Tensor]]:
        """Return the mean KL(exact || bundle) in nats, and its gradients by the trainable tensors.

        Every layer is read twice: forward, and again with its inputs for the backward.

        Args:
            ids: [B, S] int64 token ids.
            exact: [B, S, H] of `exact_states`.
        """
        inputs = [self.stream.initial_hidden(ids)]
        for layer in self._layers():
            self._put(self.floats.of_layer(layer.layer), values)
            inputs.append(layer.forward(inputs[-1]))
        loss, coming, found = self._head_gradients(exact, inputs.pop(), values)
        while inputs:
            states = inputs.pop().requires_grad_()
            with self._layer(len(inputs)) as layer:
                own = self.floats.of_layer(layer.layer)
                leaves = self._put(own, values, trains=True)
                with torch.enable_grad():
                    output = layer.forward_with_gradient(states)
                coming, *by_own = torch.autograd.grad(
                    output, [states, *leaves], coming, allow_unused=True
                )
                found |= _named(own, leaves, by_own)
        return loss, found

    def _head_gradients(
        self, exact: torch.Tensor, states: torch.Tensor, values: Values
    ) -> tuple[float, torch.Tensor, dict[str, torch.Tensor]]:
        """Return the mean KL and its gradients by the last states and by the tensors behind."""
        own = self.floats.of_layer(None)
        n_tokens = states.shape[0] * states.shape[1]
        loss, by_states = 0.0, []
        sums = [torch.zeros_like(values[place.name]) for place in own]
        for one, other in _pieces(exact, states):
            given = other.detach().requires_grad_()
            leaves = {p.name: values[p.name].detach().clone().requires_grad_() for p in own}
            with torch.enable_grad():
                kl = self._head_divergence(one, given, leaves).sum() / n_tokens
            found = torch.autograd.grad(kl, [given, *self._held(own)])
            loss += float(kl)
            by_states.append(found[0])
            for total, part in zip(sums, found[1:], strict=True):
                total += part
        coming = torch.cat(by_states, dim=1).reshape(states.shape)
        return loss, coming, {p.name: each for p, each in zip(own, sums, strict=True)}

    def _head_divergence(
        self, exact: torch.Tensor, states: torch.Tensor, values: Values
    ) -> torch.Tensor:
        own = self.floats.of_layer(None)
        self._put(own, self.floats.start)
        wanted = F.log_softmax(self.stream.logits(exact)[0], dim=-1)
        self._put(own, values)
        made = F.log_softmax(self.stream.logits_with_gradient(states)[0], dim=-1)
        terms = wanted.exp() * (wanted - made)
        return terms.masked_fill(wanted == -torch.inf, 0.0).sum(dim=-1)

    def _put(
        self, places: Sequence[FloatPlace], values: Values, *, trains: bool = False
    ) -> list[torch.Tensor]:
        for place in places:
            value = values[place.name]
            if trains:
                value = value.detach().clone().requires_grad_()
            self.stream.put(place.parameter, value)
        return self._held(places)

    def _held(self, places: Sequence[FloatPlace]) -> list[torch.Tensor]:
        return [self.stream.model.get_parameter(place.parameter) for place in places]

    def _layers(self) -> Iterator[StreamedLayer]:
        for layer in self.stream.layers():
            self._experts = {} if layer.moe is None else self._experts_of(layer.layer)
            yield layer
        self._experts = {}

    @contextmanager
    def _layer(self, index: int) -> Iterator[StreamedLayer]:
        with closing(self.stream.layers(index)) as layers:
            layer = next(layers)
            self._experts = {} if layer.moe is None else self._experts_of(index)
            yield layer
        self._experts = {}

    def _answer(self, call: LayerCall) -> torch.Tensor:
        if self._watch is not None:
            self._watch(call)
        held = self._experts
        is_there = torch.tensor([e in held for e in range(self.stream.shape.experts)])
        index, present = call.find_present()
        present = is_there[index] if present is None else is_there[index] & present

        def supply(wanted: list[int]) -> Iterator[tuple[int, Mapping[str, AnyWeight]]]:
            return ((expert, held[expert]) for expert in wanted)

        if call.hidden.requires_grad or call.weight.requires_grad:
            return weighed_experts(
                call.module, call.hidden, index, call.weight, supply, present=present
            )
        return run_experts(call.module, call.hidden, index, call.weight, supply, present=present)


def _pieces(
    exact: torch.Tensor, states: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield [1, n, H] of both at a time, since the logits of all tokens would be too many."""
    flat = (each.reshape(1, -1, each.shape[-1]) for each in (exact, states))
    pieces = (torch.split(each, HEAD_TOKENS, 1) for each in flat)
    return zip(*pieces, strict=True)


def _named(
    places: Sequence[FloatPlace], leaves: Sequence[torch.Tensor], found: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return gradients by name; zeros where nothing depends on a tensor."""
    return {
        place.name: torch.zeros_like(leaf) if each is None else each
        for place, leaf, each in zip(places, leaves, found, strict=True)
    }
