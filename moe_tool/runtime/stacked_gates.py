"""Router matrices of all MoE layers as one, so that one product predicts several layers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.models.moe_layers import MoeLayerModules, top_k
from moe_tool.models.router_rule import RouterRule
from moe_tool.models.skeleton import LayerCall
from moe_tool.policies.prefetch import Prediction, parse_prefetch

_CLOSE = 1e-4
"""Relative difference of logits that other orders of summation may cause"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StackedGates:
    """Routers of L MoE layers as one matrix (arXiv:2411.01433, section 4.2)."""

    weight: torch.Tensor
    """[L * E, H], the first layer's rows first"""
    bias: torch.Tensor | None
    """Biases, [L * E]; None: no router has one"""
    top_k: int
    """K"""
    layers: tuple[int, ...]
    """Decoder layers, ascending"""
    rules: Mapping[int, RouterRule]
    """Decoder layer -> router rule"""

    @property
    def n_experts(self) -> int:
        """E."""
        return len(self.weight) // len(self.layers)

    def logits(self, hidden: torch.Tensor, first: int, count: int) -> torch.Tensor:
        """Return the logits of `count` layers from position `first` on, [count, T, E], of hidden
        states [T, H], by one product. Their last bits may differ from those of a router alone."""
        rows = slice(first * self.n_experts, (first + count) * self.n_experts)
        bias = None if self.bias is None else self.bias[rows]
        found = functional.linear(hidden.to(self.weight.dtype), self.weight[rows], bias)
        return found.view(len(hidden), count, self.n_experts).transpose(0, 1)

    def choose(self, at: int, logits: torch.Tensor) -> Prediction:
        """Return the routing of the layer at a position by its logits, [T, E]."""
        rule = self.rules[self.layers[at]]
        index = rule.selection_scores(logits).topk(self.top_k, dim=-1)[1]
        return Prediction(
            layer=self.layers[at],
            index=index.numpy(),
            weight=rule.weights(logits, index).numpy(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StackedPredictor:
    """`Predictor` that applies the routers of the next `depth` layers to this layer's input, in one
    product; each layer's experts are chosen only when asked for."""

    gates: StackedGates
    depth: int

    @torch.no_grad()
    def predict(self, at: LayerCall) -> Iterator[Prediction]:
        """Yield the routing of the next layers, the nearest first."""
        first = self.gates.layers.index(at.layer) + 1
        count = min(self.depth, len(self.gates.layers) - first)
        if count > 0:
            logits = self.gates.logits(at.routed_hidden, first, count)
            for ahead in range(count):
                yield self.gates.choose(first + ahead, logits[ahead])


def gate_bytes(prefetch: str, shape: MoeShape) -> int:
    """Return the memory that a `--prefetch` text takes for stacked routers, at most."""
    is_stacked = parse_prefetch(prefetch).depth > 1
    return is_stacked * 4 * len(shape.layers) * shape.experts * shape.hidden  # float32


@torch.no_grad()
def stack_gates(
    layers: Sequence[MoeLayerModules], rules: Mapping[int, RouterRule]
) -> StackedGates | None:
    """Return the loaded routers of all MoE layers as one; None if they cannot be.

    That is so if a layer's rule is unknown, if matrices differ in shape or type, or if a router
    does more than a product before its rule: its own routing of a probe has to be the same.
    """
    weights: list[Any] = [getattr(modules.router, "weight", None) for modules in layers]
    biases: list[Any] = [getattr(modules.router, "bias", None) for modules in layers]
    first = weights[0]
    if not isinstance(first, torch.Tensor) or first.dim() != 2:
        return None
    for modules, weight, bias in zip(layers, weights, biases, strict=True):
        if not isinstance(weight, torch.Tensor) or modules.chooses_by_token:
            return None
        is_alike = (weight.shape, weight.dtype) == (first.shape, first.dtype)
        if not is_alike or (bias is None) != (biases[0] is None) or modules.layer not in rules:
            return None
    gates = StackedGates(
        weight=torch.cat(weights),
        bias=None if biases[0] is None else torch.cat(biases).to(first.dtype),
        top_k=top_k(layers[0]),
        layers=tuple(modules.layer for modules in layers),
        rules=rules,
    )
    return gates if _agrees(gates, layers) else None


def _agrees(gates: StackedGates, layers: Sequence[MoeLayerModules]) -> bool:
    """Return whether every router's own logits and choice are those of the stacked matrix."""
    n_inputs = gates.weight.shape[1]
    probe = torch.sin(torch.arange(2 * n_inputs, dtype=torch.float32)).view(2, n_inputs)
    probe = probe.to(gates.weight.dtype)
    every = gates.logits(probe, 0, len(layers))
    for at, (modules, logits) in enumerate(zip(layers, every, strict=True)):
        routed, found = modules.route(probe), gates.choose(at, logits)
        own = routed.logits.to(logits.dtype)
        if own.shape != logits.shape or not torch.allclose(own, logits, rtol=_CLOSE, atol=_CLOSE):
            return False
        if sorted(found.index.ravel()) != sorted(routed.index.numpy().ravel()):
            return False
    return True
