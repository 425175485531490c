"""Model without experts: loading of its parameters, and hooks for the experts function."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.experts.combine import Supply, run_experts
from moe_tool.formats.safetensors_index import Checkpoint
from moe_tool.models.meta_model import CALL_ATTRIBUTE
from moe_tool.models.moe_layers import MoeLayerModules, expert_parameters
from moe_tool.models.tensor_map import TensorMap

_ROUTED_ATTRIBUTE = "_moe_tool_router_logits"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCall:
    """Call of the experts of one layer."""

    layer: int
    """Decoder-layer index."""
    module: nn.Module
    """Experts module without parameters, but with its activation and attributes."""
    hidden: torch.Tensor
    """[T, H] hidden states"""
    index: torch.Tensor
    """[T, K] int64 chosen experts; E or more means no expert"""
    weight: torch.Tensor
    """[T, K] gate weights"""
    router_logits: torch.Tensor | None
    """[T, E] router logits; None if the router did not run before its experts"""
    router_input: torch.Tensor | None = None
    """[T, H] input of the router, if it is another than the experts' input"""

    @property
    def routed_hidden(self) -> torch.Tensor:
        """Hidden states that the router chose by, [T, H]."""
        return self.hidden if self.router_input is None else self.router_input

    def find_present(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return valid experts, [T, K], and the mask of slots with an expert, [T, K] bool; None if
        all have one."""
        n_experts: Any = self.module.num_experts
        if len(self.index) == 1:  # faster than a torch operation for a single token
            highest = max(self.index.tolist()[0])
        else:
            highest = int(self.index.max()) if self.index.numel() else 0
        if highest < n_experts:
            return self.index, None
        return self.index.clamp(max=n_experts - 1), self.index < n_experts

    def run_experts(self, supply: Supply) -> torch.Tensor:
        """Return the weighted sum of the experts' outputs, [T, H], see `combine.run_experts`."""
        index, present = self.find_present()
        return run_experts(self.module, self.hidden, index, self.weight, supply, present=present)


class Skeleton:
    """A model that can run once its experts function is set."""

    def __init__(
        self, *, model: PreTrainedModel, shape: MoeShape, layers: tuple[MoeLayerModules, ...]
    ) -> None:
        """Store the parts made by `SkeletonLoader`."""
        self.model = model
        self.shape = shape
        self.layers = layers

    def set_experts_function(self, answer: Callable[[LayerCall], torch.Tensor]) -> None:
        """Let `answer` compute the experts of every layer: LayerCall -> [T, H]."""
        set_experts_function(self.layers, answer)


def set_experts_function(
    layers: Iterable[MoeLayerModules], answer: Callable[[LayerCall], torch.Tensor]
) -> None:
    """Let `answer` compute the experts of these layers."""
    for modules in layers:
        object.__setattr__(modules.experts, CALL_ATTRIBUTE, _caller(modules, answer))


def remove_experts(layers: Iterable[MoeLayerModules]) -> None:
    """Remove the experts' parameters from their modules."""
    for modules in layers:
        for name in expert_parameters(modules):
            modules.experts._parameters.pop(name)
        # transformers would initialize the missing parameters.
        modules.experts._is_hf_initialized = True  # type: ignore[assignment]


def hook_routers(layers: Iterable[MoeLayerModules]) -> None:
    """Keep the logits of a router until its experts are called."""
    for modules in layers:
        modules.router.register_forward_hook(_keep_logits(modules))


def make_unsaved_buffers(model: PreTrainedModel) -> None:
    """Compute the buffers that no checkpoint contains, e.g. rotary frequencies; before any load."""
    owners: dict[str, list[str]] = {}
    for name, _ in model.named_non_persistent_buffers():
        owner, _, buffer = name.rpartition(".")
        owners.setdefault(owner, []).append(buffer)
    for owner, buffers in owners.items():
        module = model.get_submodule(owner)
        for buffer in buffers:
            module._buffers[buffer] = torch.empty_like(module._buffers[buffer], device="cpu")  # type: ignore[arg-type]
        with torch.no_grad():
            model._init_weights(module)  # type: ignore[no-untyped-call]


def load_groups(
    model: PreTrainedModel, tensor_map: TensorMap, checkpoint: Checkpoint, targets: Iterable[str]
) -> list[str]:
    """Read groups of tensors into the model's parameters, one group at a time.

    Args:
        model: changed in place.
        tensor_map: map of `model` and `checkpoint`.
        checkpoint: an open checkpoint.
        targets: keys of `tensor_map.skeleton`.

    Returns:
        Names of the parameters and buffers that were set.
    """
    loaded = []
    for target in targets:
        made = read_group(tensor_map, checkpoint, target)
        for name in list(made):
            assign(model, name, made.pop(name))
            loaded.append(name)
    return loaded


def read_group(
    tensor_map: TensorMap, checkpoint: Checkpoint, target: str
) -> dict[str, torch.Tensor]:
    """Return the parameters made from a group of tensors, in the dtype of the checkpoint."""
    pieces = tensor_map.skeleton[target]
    return tensor_map.convert(target, pieces, [checkpoint.read(piece.name) for piece in pieces])


def assign(model: PreTrainedModel, name: str, value: torch.Tensor) -> None:
    """Set a parameter or buffer of the model, converted to the model's dtype for it."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._buffers:
        old = module._buffers[leaf]
        assert old is not None
        module._buffers[leaf] = value.to(old.dtype)
        return
    parameter = module._parameters[leaf]
    assert parameter is not None
    loaded = nn.Parameter(value.to(parameter.dtype).contiguous(), requires_grad=False)
    loaded._is_hf_initialized = True  # type: ignore[attr-defined]
    module._parameters[leaf] = loaded


def _caller(
    modules: MoeLayerModules, answer: Callable[[LayerCall], torch.Tensor]
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    def call(hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logits, seen = modules.router.__dict__.pop(_ROUTED_ATTRIBUTE, (None, None))
        is_same = (
            seen is None or seen.shape == hidden.shape and seen.data_ptr() == hidden.data_ptr()
        )
        return answer(
            LayerCall(
                layer=modules.layer,
                module=modules.experts,
                hidden=hidden,
                index=index,
                weight=weight,
                router_logits=logits,
                router_input=None if is_same else seen,
            )
        )

    return call


def _keep_logits(modules: MoeLayerModules) -> Callable[..., None]:
    def keep(
        router: nn.Module, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]
    ) -> None:
        logits, seen = output[modules.logits_position], inputs[0]
        kept = (logits.flatten(0, -2), seen.flatten(0, -2))
        object.__setattr__(router, _ROUTED_ATTRIBUTE, kept)

    return keep
