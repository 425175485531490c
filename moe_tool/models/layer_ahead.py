"""Input of the next decoder layer's router, computed before this layer's experts are done."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from moe_tool.errors import UsageError
from moe_tool.models.meta_model import CALL_ATTRIBUTE
from moe_tool.models.moe_layers import MoeLayerModules, decoder_layers
from moe_tool.models.skeleton import set_experts_function

_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
"""Modules of a decoder layer of the usual form: x + self_attn(input_layernorm(x)), then the same
with post_attention_layernorm and mlp"""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """Arguments of a decoder layer's call."""

    residual: torch.Tensor | None
    """Hidden states after attention, [B, S, H]; None until their norm is called"""
    arguments: dict[str, Any]
    """All but the hidden states"""


class LayersAhead:
    """Listener to decoder layers that can run the next one's attention ahead of its turn.

    It keeps a layer's arguments only while that layer runs.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[MoeLayerModules]) -> None:
        """Hook the layers that a layer with experts follows; `pairs_of` must have found some."""
        self._every = decoder_layers(model)
        self.next: Mapping[int, MoeLayerModules] = pairs_of(model, layers)
        """Decoder layer -> the modules of the next one"""
        self._modules = {each.layer: each for each in layers}
        self._entries: dict[int, _Entry] = {}
        self._hooks: list[Any] = []
        for layer in self.next:
            module: Any = self._every[layer]
            norm = module.post_attention_layernorm
            self._hooks += [
                module.register_forward_pre_hook(self._enter(layer), with_kwargs=True),
                norm.register_forward_pre_hook(self._keep_residual(layer)),
                module.register_forward_hook(self._leave(layer)),
            ]

    def router_input(self, layer: int, routed: torch.Tensor) -> torch.Tensor | None:
        """Return what the next decoder layer's router would get, [T, H], if this layer's routed
        experts gave `routed`, [T, H]; None if no layer with experts follows, or the KV cache is of
        a kind that cannot be looked into.

        Call it while the experts of `layer` are called. The KV cache stays as it is.
        """
        entry = self._entries.get(layer)
        if entry is None or entry.residual is None:
            return None
        arguments = dict(entry.arguments)
        cache = arguments.get("past_key_values")
        if cache is not None:
            if type(cache) is not DynamicCache:
                return None
            arguments["past_key_values"] = _aside(cache, layer + 1)
        hidden = entry.residual + self._block(layer, entry.residual, routed)
        following: Any = self._every[layer + 1]
        attended = following.self_attn(
            hidden_states=following.input_layernorm(hidden), **arguments
        )[0]
        seen: torch.Tensor = following.post_attention_layernorm(hidden + attended)
        return seen.flatten(0, -2)

    def close(self) -> None:
        """Remove the hooks."""
        while self._hooks:
            self._hooks.pop().remove()
        self._entries.clear()

    def _block(self, layer: int, residual: torch.Tensor, routed: torch.Tensor) -> torch.Tensor:
        """Return the output of a layer's block, shared experts included, [B, S, H]."""
        modules, module = self._modules[layer], self._every[layer]
        answer = modules.experts.__dict__[CALL_ATTRIBUTE]
        set_experts_function([modules], lambda call: routed)
        try:
            output = module.mlp(module.post_attention_layernorm(residual))  # type: ignore[operator]
        finally:
            object.__setattr__(modules.experts, CALL_ATTRIBUTE, answer)
        found: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return found

    def _enter(self, layer: int) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if len(args) > 1:  # arguments without names cannot be handed to the next attention
                return
            arguments = {name: given for name, given in kwargs.items() if name != "hidden_states"}
            self._entries[layer] = _Entry(residual=None, arguments=arguments)

        return enter

    def _keep_residual(self, layer: int) -> Callable[..., None]:
        def keep(norm: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            entry = self._entries.get(layer)
            if entry is not None:  # else the layer is only looked at
                self._entries[layer] = _Entry(residual=args[0], arguments=entry.arguments)

        return keep

    def _leave(self, layer: int) -> Callable[..., None]:
        def leave(module: nn.Module, args: object, output: object) -> None:
            self._entries.pop(layer, None)

        return leave


def pairs_of(
    model: PreTrainedModel, layers: Sequence[MoeLayerModules]
) -> dict[int, MoeLayerModules]:
    """Return the layers with experts that another one follows, and that one's modules.

    Args:
        model: its tensors need not be loaded.
        layers: every layer with experts, ascending.

    Raises:
        UsageError: a decoder layer is not of the usual form, or no layer with experts follows
            another.
    """
    every = decoder_layers(model)
    config: Any = model.config.get_text_config()
    if len(set(getattr(config, "layer_types", None) or ())) > 1:
        raise _refusal("its layers attend in different ways")
    with_experts = {each.layer: each for each in layers}
    pairs = {each: with_experts[each + 1] for each in with_experts if each + 1 in with_experts}
    if not pairs:
        raise _refusal("no decoder layer with experts follows another")
    for layer in sorted({*pairs, *(each + 1 for each in pairs)}):
        module = every[layer]
        is_usual = {name for name, _ in module.named_children()} == _PARTS
        is_usual &= not any(isinstance(each, float) for each in vars(module).values())
        if not is_usual or with_experts[layer].block is not module.mlp:
            raise _refusal(f"decoder layer {layer} is not two residual blocks of norm and module")
    if any(each.chooses_by_token for each in pairs.values()):
        raise _refusal("its routers choose by token")
    return pairs


def _aside(cache: DynamicCache, layer: int) -> DynamicCache:
    """Return a cache to which `layer` can append without changing what `cache` holds.

    Layers hold views of their tensors and replace them, so that a copy of the layer object is
    enough; what a preallocated one writes lies behind what the original holds.
    """
    found = copy.copy(cache)
    found.layers = list(cache.layers)
    if layer < len(found.layers):
        found.layers[layer] = copy.copy(found.layers[layer])
    return found


def _refusal(reason: str) -> UsageError:
    return UsageError(
        f"--prefetch partial cannot look ahead in this model: {reason}",
        hint="--prefetch next-layer",
    )
