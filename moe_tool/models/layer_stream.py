"""Forward pass through a model with one decoder layer in memory at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.errors import CorruptArtifactError
from moe_tool.formats.finite_numbers import are_finite
from moe_tool.formats.safetensors_index import Checkpoint
from moe_tool.models.architecture import read_shape
from moe_tool.models.expert_source import ExpertSource
from moe_tool.models.meta_model import build_meta_model
from moe_tool.models.moe_layers import (
    MoeLayerModules,
    decoder,
    decoder_layers,
    decoder_prefix,
    unsupported,
)
from moe_tool.models.skeleton import (
    LayerCall,
    hook_routers,
    load_groups,
    make_unsaved_buffers,
    remove_experts,
    set_experts_function,
)
from moe_tool.models.tensor_map import TensorMap


@dataclass(frozen=True, slots=True)
class _CallArguments:
    """Arguments of a decoder layer, besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedLayer:
    """One decoder layer, whose weights are in memory until the next one is requested."""

    layer: int
    """Decoder-layer index."""
    moe: MoeLayerModules | None
    """Modules of the MoE layer; None for a dense layer."""
    forward: Callable[[torch.Tensor], torch.Tensor]
    """Function of the layer on hidden states [B, S, H], with experts by the experts function."""


class LayerStream:
    """Model with embeddings, head and all routers in memory, and decoder layers loaded in turn.

    A full pass of `layers`, with each expert read once from `experts`, reads every used tensor
    once. Sequences are never padded: positions run from 0 and every token attends to all before it,
    or to its window.
    """

    def __init__(
        self, folder: Path, checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32
    ) -> None:
        """Check the checkpoint against config.json; load routers and everything outside the layers.

        Args:
            folder: holds config.json.
            checkpoint: a whole checkpoint; stays open and owned by the caller.
            dtype: dtype of the loaded parameters.

        Raises:
            NotFoundError, UnsupportedModelError: as `build_meta_model`.
            CorruptArtifactError: a tensor is missing or has another shape; raised before any read.
        """
        self.model = build_meta_model(folder, dtype)
        self._checkpoint = checkpoint
        self._map = TensorMap(self.model, checkpoint)
        self.moe_layers = tuple(self._map.moe_layers.values())
        """Modules of every MoE layer; the routers stay loaded, see `MoeLayerModules.route`."""
        missing = self._map.check_skeleton()
        self.experts = ExpertSource(self.model, checkpoint)
        self.shape: MoeShape = read_shape(self.model, checkpoint)
        remove_experts(self.moe_layers)
        self._layer_targets = self._targets_by_layer()
        make_unsaved_buffers(self.model)
        load_groups(self.model, self._map, checkpoint, self._layer_targets.pop(None, []))
        self.model.tie_weights(missing_keys=set(missing), recompute_mapping=False)
        hook_routers(self.moe_layers)
        self._arguments: dict[torch.Size, list[_CallArguments]] = {}

    def set_experts_function(self, answer: Callable[[LayerCall], torch.Tensor]) -> None:
        """Let `answer` compute the experts of every layer: LayerCall -> [T, H]."""
        set_experts_function(self.moe_layers, answer)

    @torch.no_grad()
    def initial_hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the hidden states before the first decoder layer, [B, S, H].

        Args:
            tokens: [B, S] int64.

        Raises:
            UnsupportedModelError: this model's layers pass each other more than hidden states.
        """
        taps = [_Tap(layer) for layer in decoder_layers(self.model)]
        with self._layers_replaced(taps):
            decoder(self.model)(input_ids=tokens, use_cache=False)
        hidden = taps[0].hidden
        assert hidden is not None
        for tap in taps:
            self._require_plain(tap, hidden, tokens)
        self._arguments.setdefault(
            tokens.shape, [_CallArguments(tap.args, tap.kwargs) for tap in taps]
        )
        return hidden

    def layers(self, start: int = 0) -> Iterator[StreamedLayer]:
        """Yield the decoder layers from `start` on, each in memory until the next is requested."""
        for index, module in enumerate(decoder_layers(self.model)):
            if index < start:
                continue
            loaded = load_groups(
                self.model, self._map, self._checkpoint, self._layer_targets.get(index, [])
            )
            try:
                yield StreamedLayer(
                    layer=index,
                    moe=self._map.moe_layers.get(index),
                    forward=self._forward_of(index, module),
                )
            finally:
                self._drop(loaded)

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits, [B, S, V], of hidden states after the last layer, [B, S, H], by final
        norm, head and scaling."""
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64)
        layers: list[nn.Module] = [_Tap(layer) for layer in decoder_layers(self.model)]
        layers[-1] = _Feed(hidden, decoder_layers(self.model)[-1])
        with self._layers_replaced(layers):
            return self.model(input_ids=tokens, use_cache=False).logits  # type: ignore[no-any-return]

    def _targets_by_layer(self) -> dict[int | None, list[str]]:
        """Group the skeleton's targets by decoder layer; None: routers, and all outside layers."""
        prefix = decoder_prefix(self.model)
        names = {module: name for name, module in self.model.named_modules()}
        routers = tuple(f"{names[modules.router]}." for modules in self.moe_layers)
        blocks = {names[modules.block] for modules in self.moe_layers}
        targets: dict[int | None, list[str]] = {}
        for target in self._map.skeleton:
            layer = None
            is_of_router = target.startswith(routers) or target.rpartition(".")[0] in blocks
            if target.startswith(prefix) and not is_of_router:
                layer = int(target.removeprefix(prefix).split(".")[0])
            targets.setdefault(layer, []).append(target)
        return targets

    def _forward_of(self, index: int, module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        @torch.no_grad()
        def forward(hidden: torch.Tensor) -> torch.Tensor:
            shape = hidden.shape[:2]
            if shape not in self._arguments:
                self.initial_hidden(torch.zeros(shape, dtype=torch.int64))
            call = self._arguments[shape][index]
            output = module(hidden, *call.args, **call.kwargs)
            if isinstance(output, tuple):
                if any(extra is not None for extra in output[1:]):
                    raise unsupported(
                        self.shape.model_type, "its layers return more than hidden states"
                    )
                output = output[0]
            if not are_finite(output):
                raise CorruptArtifactError(
                    f"layer {index} gives hidden states that are not finite",
                    hint="its weights are finite, so it overflows in float32: download the "
                    "checkpoint again, or use another version of the model",
                )
            return output  # type: ignore[no-any-return]

        return forward

    def _drop(self, names: list[str]) -> None:
        for name in names:
            owner, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(owner)
            if leaf in module._buffers:
                module._buffers[leaf] = module._buffers[leaf].to("meta")  # type: ignore[union-attr]
            else:
                meta = module._parameters[leaf].to("meta")  # type: ignore[union-attr]
                module._parameters[leaf] = nn.Parameter(meta, requires_grad=False)

    @contextmanager
    def _layers_replaced(self, layers: list[Any]) -> Iterator[None]:
        owner = decoder(self.model)
        real = owner.layers
        owner.layers = nn.ModuleList(layers)
        try:
            yield
        finally:
            owner.layers = real

    def _require_plain(self, tap: "_Tap", hidden: torch.Tensor, tokens: torch.Tensor) -> None:
        if tap.hidden is not hidden:
            raise unsupported(self.shape.model_type, "the hidden states change between its layers")
        for value in (*tap.args, *tap.kwargs.values()):
            if value is tokens or isinstance(value, dict | list):
                reason = "its layers pass each other more than hidden states"
                raise unsupported(self.shape.model_type, reason)
        tap.hidden = None


class _Tap(nn.Module):
    """Replacement of a decoder layer that returns its input and keeps its arguments."""

    def __init__(self, real: nn.Module) -> None:
        super().__init__()
        self.__dict__["real"] = real  # not as a submodule, which would expose its weights
        self.hidden: torch.Tensor | None = None
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["real"], name)  # e.g. attention_type

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the hidden states unchanged."""
        self.hidden, self.args, self.kwargs = hidden_states, args, kwargs
        return hidden_states


class _Feed(_Tap):
    """Replacement of the last decoder layer that returns given hidden states."""

    def __init__(self, hidden: torch.Tensor, real: nn.Module) -> None:
        super().__init__(real)
        self.__dict__["given"] = hidden

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the given hidden states."""
        return self.__dict__["given"]  # type: ignore[no-any-return]
