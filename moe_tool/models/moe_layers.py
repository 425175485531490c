"""Experts and router of every MoE layer inside a transformers model."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_tool.errors import UnsupportedModelError

_BATCHED_ROUTERS = frozenset({"AfmoeTokenChoiceRouter", "ZayaRouter"})
"""Classes of routers that take [B, S, H] only"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Routed:
    """Output of a router."""

    logits: torch.Tensor
    """[T, E] router logits"""
    index: torch.Tensor
    """[T, K] int64 chosen experts"""
    weight: torch.Tensor
    """[T, K] gate weights"""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeLayerModules:
    """The modules of one MoE layer."""

    layer: int
    """Decoder-layer index."""
    experts: nn.Module
    """The experts module of transformers' interface."""
    router: nn.Module
    block: nn.Module
    """Module that contains router and experts, and in some architectures the selection bias."""
    logits_position: int
    """Position of the logits in the router's output."""

    @property
    def chooses_by_token(self) -> bool:
        """Whether token ids choose the experts, so that `route` cannot."""
        return "input_ids" in _argument_names(type(self.router).forward)

    def route(self, hidden: torch.Tensor) -> Routed:
        """Apply the router to hidden states [T, H] of this or another layer."""
        if type(self.router).__name__ in _BATCHED_ROUTERS:
            hidden = hidden[None]
        return self.read_output(self.router(hidden, **self._extra_arguments()))

    def read_output(self, output: Sequence[torch.Tensor]) -> Routed:
        """Return logits, indices and weights of a router's output."""
        logits = output[self.logits_position]
        rest = [each for position, each in enumerate(output) if position != self.logits_position]
        chosen = [each for each in rest if not each.is_floating_point()]
        weights = [each for each in rest if each.is_floating_point()]
        return Routed(logits=logits, index=chosen[0], weight=weights[0])

    def _extra_arguments(self) -> dict[str, torch.Tensor]:
        # minimax_m2 has the selection bias in the block, which passes it by this name.
        names = _argument_names(type(self.router).forward)[2:]
        found = {name: getattr(self.block, name, None) for name in names}
        return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


@cache
def _argument_names(function: Callable[..., object]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder layers of a model's text part."""
    return decoder(model).layers  # type: ignore[return-value]


def decoder(model: PreTrainedModel) -> nn.Module:
    """Return the module that owns the decoder layers.

    Raises:
        UnsupportedModelError: there is none.
    """
    candidate: Any = model.get_decoder()  # type: ignore[no-untyped-call]
    for _ in range(3):
        if isinstance(getattr(candidate, "layers", None), nn.ModuleList):
            return candidate  # type: ignore[no-any-return]
        names = ("language_model", "text_model", "model", "decoder")
        candidate = next((getattr(candidate, n) for n in names if hasattr(candidate, n)), None)
    raise unsupported(
        model.config.model_type, "its decoder layers are not where they are looked for"
    )


def decoder_prefix(model: PreTrainedModel) -> str:
    """Return the prefix of decoder layers' names, e.g. "model.layers."."""
    layers = decoder_layers(model)
    name: str = next(name for name, module in model.named_modules() if module is layers)
    return f"{name}."


def find_moe_layers(model: PreTrainedModel) -> tuple[MoeLayerModules, ...]:
    """Return the MoE layers in ascending order.

    Raises:
        UnsupportedModelError: the model is dense, its experts do not use transformers' experts
            interface, or its MoE layers differ.
    """
    model_type = model.config.model_type
    prefix = decoder_prefix(model)
    found: dict[int, str] = {}
    for name, module in model.named_modules():
        if not (hasattr(module, "_is_expert_parallel") and hasattr(module, "is_transposed")):
            continue
        index = name.removeprefix(prefix).split(".")[0]
        if not name.startswith(prefix) or not index.isdigit():
            raise unsupported(model_type, f"it has experts outside its decoder layers ({name})")
        if int(index) in found:
            raise unsupported(model_type, f"decoder layer {index} has two groups of experts")
        found[int(index)] = name
    if not found:
        raise unsupported(
            model_type, "it has no experts that transformers' experts interface reaches"
        )
    layers = tuple(_modules(model, layer, found[layer]) for layer in sorted(found))
    _require_uniform(model_type, layers)
    return layers


def expert_parameters(modules: MoeLayerModules) -> dict[str, tuple[int, ...]]:
    """Return names and shapes [E, ...] of one layer's stacked experts, in the module's order."""
    named = modules.experts.named_parameters(recurse=False)
    return {name: tuple(parameter.shape) for name, parameter in named}


def top_k(modules: MoeLayerModules) -> int:
    """Return K, the number of experts that this layer's router chooses.

    Raises:
        UnsupportedModelError: neither router nor config has it.
    """
    config: Any = modules.experts.config
    names = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k")
    places = ((modules.router, "top_k"), (modules.block, "top_k"), *((config, n) for n in names))
    for owner, name in places:
        value = getattr(owner, name, None)
        if isinstance(value, int):
            return value
    raise unsupported(config.model_type, "how many experts its routers choose is not known")


def unsupported(model_type: str, reason: str) -> UnsupportedModelError:
    """Return the error that refuses an architecture."""
    return UnsupportedModelError(
        f"{model_type!r} is not supported: {reason}",
        hint="README.md lists the model types that are tested",
    )


def _modules(model: PreTrainedModel, layer: int, experts_name: str) -> MoeLayerModules:
    block_name = experts_name.rpartition(".")[0]
    block = model.get_submodule(block_name)
    experts = model.get_submodule(experts_name)
    recorder = (getattr(decoder(model), "_can_record_outputs", None) or {}).get("router_logits")
    if isinstance(recorder, list | tuple):
        recorder = recorder[0] if len(recorder) == 1 else None
    target = getattr(recorder, "target_class", recorder)
    if not isinstance(target, type):
        raise unsupported(
            model.config.model_type, "transformers does not say where its routers are"
        )
    routers = [module for module in block.modules() if isinstance(module, target)]
    for name in ("gate", "router"):  # some layers have a router of another class
        named = getattr(block, name, None)
        if not routers and isinstance(named, nn.Module):
            routers = [named]
    if len(routers) != 1 or any(module is experts for module in routers[0].modules()):
        raise unsupported(
            model.config.model_type, f"layer {layer} has no router apart from its experts"
        )
    return MoeLayerModules(
        layer=layer,
        experts=experts,
        router=routers[0],
        block=block,
        logits_position=getattr(recorder, "index", 0),
    )


def _require_uniform(model_type: str, layers: tuple[MoeLayerModules, ...]) -> None:
    first = layers[0]
    for other in layers[1:]:
        same = expert_parameters(other) == expert_parameters(first)
        if (
            not same
            or other.experts.num_experts != first.experts.num_experts
            or top_k(other) != top_k(first)
        ):
            reason = f"experts of layers {first.layer} and {other.layer} differ in number or shape"
            raise unsupported(model_type, reason)
