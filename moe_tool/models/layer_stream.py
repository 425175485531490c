"""Forward pass through a model with one decoder layer in memory at a time."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.budget.table_choice import AUTO_ROWS, RowsRequest
from moe_tool.errors import CorruptArtifactError, UnsupportedModelError
from moe_tool.formats.finite_numbers import are_finite
from moe_tool.formats.safetensors_index import Checkpoint
from moe_tool.formats.table_rows import TableRows
from moe_tool.models.architecture import read_shape
from moe_tool.models.expert_source import ExpertSource
from moe_tool.models.layer_flow import Boundary, LayerFlow, trace_layers
from moe_tool.models.meta_model import CALL_ATTRIBUTE, build_meta_model
from moe_tool.models.moe_layers import (
    MoeLayerModules,
    decoder,
    decoder_layers,
    decoder_prefix,
)
from moe_tool.models.row_tables import RowTable, put_rows, streamed_tables
from moe_tool.models.skeleton import (
    LayerCall,
    hook_routers,
    load_groups,
    make_unsaved_buffers,
    remove_experts,
    set_experts_function,
)
from moe_tool.models.tensor_map import TensorMap

_TRACED_TOKENS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedLayer:
    """One decoder layer, whose weights are in memory until the next one is requested."""

    layer: int
    """Decoder-layer index."""
    moe: MoeLayerModules | None
    """Modules of the MoE layer; None for a dense layer."""
    forward: Callable[[torch.Tensor], torch.Tensor]
    """Function of the layer on states [B, S, W], with experts by the experts function"""
    forward_with_gradient: Callable[[torch.Tensor], torch.Tensor]
    """Function of the layer like `forward`, differentiable by parameters that require a gradient"""
    module: nn.Module


class LayerStream:
    """Model with embeddings, head and all routers in memory, and decoder layers loaded in turn.

    A full pass of `layers`, with each expert read once from `experts`, reads every used tensor
    once. Sequences are never padded: positions run from 0 and every token attends to all before it,
    or to its window.

    States are all that layers hand on, [B, S, W]. In most models they are the hidden states, and W
    is H; others have several streams, or hand on indices beside them.
    """

    def __init__(
        self,
        folder: Path,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype = torch.float32,
        rows: RowsRequest = AUTO_ROWS,
    ) -> None:
        """Check the checkpoint against config.json; load routers and everything outside the layers.

        Args:
            folder: holds config.json.
            checkpoint: a whole checkpoint; stays open and owned by the caller.
            dtype: dtype of the loaded parameters.
            rows: embedding tables of which only rows are read; of float32 parameters alone.

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
        self.on_disk: dict[str, RowTable] = {}
        """Embedding tables of which only rows are read, by parameter"""
        if dtype == torch.float32:
            self.on_disk = streamed_tables(self.model, self._map, checkpoint, rows)
        self._layer_targets = self._targets_by_layer()
        for parameter, table in self.on_disk.items():
            opened = TableRows.open_unhashed(table.parts)
            checkpoint.raw.closes.append(opened.close)
            put_rows(self.model, parameter, opened)
        make_unsaved_buffers(self.model)
        load_groups(self.model, self._map, checkpoint, self._layer_targets.pop(None, []))
        self.model.tie_weights(missing_keys=set(missing), recompute_mapping=False)
        hook_routers(self.moe_layers)
        self._flows: dict[int, LayerFlow] = {}
        self.set_experts_function(_echo)
        self.flow(_TRACED_TOKENS)  # refuses before any work

    def set_experts_function(self, answer: Callable[[LayerCall], torch.Tensor]) -> None:
        """Let `answer` compute the experts of every layer: LayerCall -> [T, H]."""
        set_experts_function(self.moe_layers, answer)

    def flow(self, seq_len: int) -> LayerFlow:
        """Return what layers hand on for sequences of one length.

        Raises:
            UnsupportedModelError: a layer depends on more than the output of the one before.
        """
        if seq_len not in self._flows:
            answers = [modules.experts.__dict__[CALL_ATTRIBUTE] for modules in self.moe_layers]
            self.set_experts_function(_echo)
            self._flows[seq_len] = trace_layers(self.model, seq_len)
            for modules, answer in zip(self.moe_layers, answers, strict=True):
                object.__setattr__(modules.experts, CALL_ATTRIBUTE, answer)
        return self._flows[seq_len]

    def require_plain(self, purpose: str) -> None:
        """Refuse a model whose layers hand on more than hidden states [B, S, H].

        Args:
            purpose: what needs it, subject of the error's sentence.
        """
        if self.flow(_TRACED_TOKENS).width != self.shape.hidden:
            raise UnsupportedModelError(
                f"{purpose} does not work with {self.shape.model_type!r}: its layers hand on more "
                "than hidden states",
                hint="everything else works with this model",
            )

    @torch.no_grad()
    def initial_hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the states before the first decoder layer, [B, S, W].

        Args:
            tokens: [B, S] int64.
        """
        flow = self.flow(tokens.shape[1])
        found = self._stop_at(0, tokens, None, lambda layer, hidden, *args, **kwargs: hidden)
        return _with_tokens(flow, flow.boundaries[0].pack(found), tokens)

    def layers(self, start: int = 0) -> Generator[StreamedLayer, None, None]:
        """Yield the decoder layers from `start` on, each in memory until the next is requested."""
        for index, module in enumerate(decoder_layers(self.model)):
            if index < start:
                continue
            loaded = load_groups(
                self.model, self._map, self._checkpoint, self._layer_targets.get(index, [])
            )
            try:
                forward = self._forward_of(index, module)
                yield StreamedLayer(
                    layer=index,
                    moe=self._map.moe_layers.get(index),
                    forward=torch.no_grad()(forward),
                    forward_with_gradient=forward,
                    module=module,
                )
            finally:
                self._drop(loaded)

    @torch.no_grad()
    def logits(self, state: torch.Tensor) -> torch.Tensor:
        """Return the logits, [B, S, V], of states after the last layer, [B, S, W], by final norm,
        head and scaling.

        Raises:
            CorruptArtifactError: the largest is not finite; -inf masks a token.
        """
        return self.logits_with_gradient(state)

    def logits_with_gradient(self, state: torch.Tensor) -> torch.Tensor:
        """Return `logits`, differentiable by the states and by parameters that require a gradient.

        Raises:
            CorruptArtifactError: the largest is not finite; -inf masks a token.
        """
        flow = self.flow(state.shape[1])
        boundary = flow.boundaries[-1]
        tokens = _tokens_of(flow, boundary, state)
        last = boundary.unpack(state)
        stubs = [_Stub(layer, lambda *_, **__: last) for layer in decoder_layers(self.model)]
        with self._layers_replaced(stubs):
            logits: torch.Tensor = self.model(input_ids=tokens, use_cache=False).logits
        if not are_finite(logits.detach().amax(dim=-1)):  # amax propagates NaN
            raise _not_finite("the head gives logits")
        return logits

    def _targets_by_layer(self) -> dict[int | None, list[str]]:
        """Group the skeleton's targets by decoder layer; None: routers, and all outside layers."""
        prefix = decoder_prefix(self.model)
        names = {module: name for name, module in self.model.named_modules()}
        routers = tuple(f"{names[modules.router]}." for modules in self.moe_layers)
        blocks = {names[modules.block] for modules in self.moe_layers}
        targets: dict[int | None, list[str]] = {}
        for target in self._map.skeleton:
            if target in self.on_disk:
                continue
            layer = None
            is_of_router = target.startswith(routers) or target.rpartition(".")[0] in blocks
            if target.startswith(prefix) and not is_of_router:
                layer = int(target.removeprefix(prefix).split(".")[0])
            targets.setdefault(layer, []).append(target)
        return targets

    def stored_name(self, parameter: str) -> str | None:
        """Return the name on disk of a parameter in memory; None if it is not stored as it is."""
        pieces = self._map.skeleton.get(parameter, [])
        if len(pieces) != 1:
            return None
        stored = self._checkpoint.read(pieces[0].name)
        held = self.model.get_parameter(parameter)
        if stored.shape != held.shape or not torch.equal(stored.to(held), held):
            return None
        return pieces[0].name

    def put(self, parameter: str, value: torch.Tensor) -> None:
        """Let the model use another tensor for a parameter, until its layer is dropped."""
        owner, _, leaf = parameter.rpartition(".")
        self.model.get_submodule(owner)._parameters[leaf] = nn.Parameter(
            value, requires_grad=value.requires_grad
        )

    def _forward_of(self, index: int, module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(state: torch.Tensor) -> torch.Tensor:
            flow = self.flow(state.shape[1])
            before, after = flow.boundaries[index], flow.boundaries[index + 1]
            tokens = _tokens_of(flow, before, state)
            found = self._stop_at(index, tokens, before.unpack(state), nn.Module.__call__)
            output = after.pack(found)
            if not are_finite(output.detach()):
                raise _not_finite(f"layer {index} gives hidden states")
            return _with_tokens(flow, output, tokens)

        return forward

    def _stop_at(
        self, index: int, tokens: torch.Tensor, given: Any, run: Callable[..., Any]
    ) -> Any:
        """Return `run` of one layer and of the arguments that the model calls it with.

        Args:
            index: decoder-layer index.
            tokens: [B, S] int64.
            given: output of the layer before; for the first one, its hidden states, or None.
            run: function of the layer and its arguments.
        """

        def stop(layer: nn.Module, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            is_replaced = index == 0 and given is not None
            raise _Stopped(run(layer, given if is_replaced else hidden, *args, **kwargs))

        stubs = [_Stub(layer, lambda *_, **__: given) for layer in decoder_layers(self.model)]
        stubs[index].answer = stop
        try:
            with self._layers_replaced(stubs):
                self.model(input_ids=tokens, use_cache=False)
        except _Stopped as stopped:
            return stopped.output
        raise AssertionError(f"the model did not call layer {index}")

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
    def _layers_replaced(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        owner = decoder(self.model)
        real = owner.layers
        owner.layers = nn.ModuleList(layers)
        try:
            yield
        finally:
            owner.layers = real


def _echo(call: LayerCall) -> torch.Tensor:
    """Answer with something that depends on all that experts depend on."""
    return call.hidden * call.weight.sum() * call.index.sum()


def _with_tokens(flow: LayerFlow, state: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    if not flow.needs_tokens:
        return state
    return torch.cat([state, tokens[..., None].to(state.dtype)], dim=-1)


def _tokens_of(flow: LayerFlow, boundary: Boundary, state: torch.Tensor) -> torch.Tensor:
    """Return the token ids [B, S] that a state holds; zeros where nothing looks at them."""
    if not flow.needs_tokens:
        return torch.zeros(state.shape[:2], dtype=torch.int64)
    return state[..., boundary.width].to(torch.int64)


class _Stub(nn.Module):
    """Replacement of a decoder layer."""

    def __init__(self, real: nn.Module, answer: Callable[..., Any]) -> None:
        super().__init__()
        self.__dict__["real"] = real  # not as a submodule, which would expose its weights
        self.answer = answer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["real"], name)  # e.g. attention_type

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the answer, a function of the real layer and its arguments."""
        return self.answer(self.__dict__["real"], hidden_states, *args, **kwargs)


class _Stopped(Exception):
    """End of a forward pass behind the only layer that runs."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


def _not_finite(what: str) -> CorruptArtifactError:
    return CorruptArtifactError(
        f"{what} that are not finite",
        hint="its weights are finite, so it overflows in float32: download the checkpoint again, "
        "or use another version of the model",
    )
