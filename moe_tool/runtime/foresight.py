"""Prediction of the next layers' experts by their routers, applied to this layer's input."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moe_tool.models.moe_layers import MoeLayerModules
from moe_tool.models.skeleton import LayerCall
from moe_tool.policies.prefetch import fetch_predicted


@dataclass(frozen=True, slots=True, kw_only=True)
class Guess:
    """Experts predicted for one of the next layers."""

    layer: int
    """Decoder layer"""
    ahead: int
    """Layer calls until that layer's"""
    experts: list[int]
    """Expert ids, the most wanted first"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Foresight:
    """Routers of the next layers, applied to the same hidden states: the residual stream changes
    little from layer to layer."""

    following: Mapping[int, Sequence[MoeLayerModules]]
    """Decoder layer -> the MoE layers after it that are predicted"""

    @torch.no_grad()
    def look(self, call: LayerCall, stored: Mapping[int, torch.Tensor]) -> list[Guess]:
        """Return the guesses of one call, the next layer first, among the experts in the bundle:
        decoder layer -> [E] bool, empty if none was removed."""
        guesses = []
        for ahead, modules in enumerate(self.following[call.layer], start=1):
            if modules.chooses_by_token:
                continue
            routed = modules.route(call.routed_hidden)
            n_experts = int(modules.experts.num_experts)  # type: ignore[arg-type]
            removed = ~stored[modules.layer].numpy() if stored else np.zeros(n_experts, np.bool_)
            experts = fetch_predicted(routed.index.numpy(), routed.weight.numpy(), removed)
            guesses.append(Guess(layer=modules.layer, ahead=ahead, experts=experts))
        return guesses


def foresee(layers: Sequence[MoeLayerModules], *, depth: int) -> Foresight:
    """Return the foresight over the next `depth` MoE layers; `layers` are all, ascending."""
    return Foresight(
        following={
            modules.layer: layers[at + 1 : at + 1 + depth] for at, modules in enumerate(layers)
        }
    )
