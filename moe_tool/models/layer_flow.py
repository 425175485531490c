"""Data that decoder layers hand on, traced without weights: can each layer run on its own?"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from transformers import PreTrainedModel

from moe_tool.errors import UnsupportedModelError
from moe_tool.models.moe_layers import decoder_layers

_BATCH = 2
_TOKENS = -1
"""Label of tensors made from the token ids"""
_UNKNOWN = -2
"""Label of real tensors with elements that only weights would tell"""


@dataclass(frozen=True, slots=True, kw_only=True)
class HandedOn:
    """One tensor that a layer hands on, [B, S, *tail]."""

    tail: tuple[int, ...]
    dtype: torch.dtype
    is_flat: bool
    """True where it is [B * S, *tail]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Boundary:
    """Everything that is handed on between two layers, or to the first or from the last one."""

    parts: tuple[HandedOn | None, ...]
    is_tuple: bool

    @property
    def width(self) -> int:
        """Number of elements per token."""
        return sum(math.prod(part.tail) for part in self.parts if part is not None)

    @property
    def is_plain(self) -> bool:
        """True for a single tensor [B, S, H]"""
        first = self.parts[0]
        return len(self.parts) == 1 and first is not None and len(first.tail) == 1

    def pack(self, output: Any) -> torch.Tensor:
        """Return a layer's output as one tensor [B, S, width]; integers become floats."""
        tensors = [each for each in _outputs(output) if each is not None]
        shape = tensors[0].shape[:2]
        if self.is_plain:
            return tensors[0]  # type: ignore[no-any-return]
        return torch.cat([each.reshape(*shape, -1).to(torch.float32) for each in tensors], dim=-1)

    def unpack(self, state: torch.Tensor) -> Any:
        """Return the layer's output again, from the first columns of [B, S, W]."""
        found: list[torch.Tensor | None] = []
        column = 0
        for part in self.parts:
            if part is None:
                found.append(None)
                continue
            end = column + math.prod(part.tail)
            lead = (state.shape[0] * state.shape[1],) if part.is_flat else state.shape[:2]
            values = state[..., column:end].reshape(*lead, *part.tail)
            found.append(values.to(part.dtype).contiguous())
            column = end
        return tuple(found) if self.is_tuple else found[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFlow:
    """Boundaries of a model's layers for sequences of one length."""

    boundaries: tuple[Boundary, ...]
    """Input of the first layer, then the output of every layer"""
    needs_tokens: bool
    """Whether layers or head see the token ids, or embeddings of their own"""

    @property
    def width(self) -> int:
        """Number of elements per token at the widest boundary, the token id included."""
        return max(boundary.width for boundary in self.boundaries) + self.needs_tokens


def trace_layers(model: PreTrainedModel, seq_len: int) -> LayerFlow:
    """Run a model whose layers have no weights, and follow what every tensor was made from.

    Args:
        model: experts functions return something; parameters on the meta device stay there.
        seq_len: S, length of a sequence.

    Raises:
        UnsupportedModelError: a layer, or the head, depends on more than the output of the layer
            before it, the token ids and the positions.
    """
    trace = _Trace(model)
    ids = torch.zeros(_BATCH, seq_len, dtype=torch.int64)
    hooks: list[Any] = []
    for index, layer in enumerate(decoder_layers(model)):
        hooks.append(layer.register_forward_pre_hook(trace.enter(index), with_kwargs=True))
        hooks.append(layer.register_forward_hook(trace.leave(index)))
    try:
        with torch.no_grad(), trace:
            trace.label([ids], {_TOKENS})
            logits = model(input_ids=ids, use_cache=False).logits
            trace.require(trace.labels_of([logits]), len(hooks) // 2)
    except UnsupportedModelError:
        raise
    except Exception as error:  # models raise anything on tensors without elements
        raise trace.refusal("what they hand on could not be traced") from error
    finally:
        for hook in hooks:
            hook.remove()
    return LayerFlow(boundaries=tuple(trace.boundaries), needs_tokens=trace.needs_tokens)


class _Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Labels on storages: the boundaries, or tokens, that their elements were made from.

    Tensors that depend on weights are on the meta device, all others have elements, so that code
    that looks at positions and masks goes its usual way.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.boundaries: list[Boundary] = []
        self.needs_tokens = False
        self._model_type = model.config.model_type
        self._labels: dict[int, frozenset[int]] = {}
        self._kept: list[torch.Tensor] = []  # so that no storage's address is used twice
        self._inside: int | None = None

    def refusal(self, reason: str = "they need more than the one before") -> UnsupportedModelError:
        """Return the error for layers that cannot run one at a time."""
        return UnsupportedModelError(
            f"{self._model_type!r} cannot be read layer by layer: {reason}",
            hint="pack it without a profile and without calibration; the bundle runs exactly",
        )

    def label(self, tensors: Sequence[torch.Tensor], labels: set[int] | frozenset[int]) -> None:
        """Set the labels of tensors."""
        for tensor in tensors:
            self._labels[_storage(tensor)] = frozenset(labels)
            self._kept.append(tensor)

    def labels_of(self, tensors: Sequence[torch.Tensor]) -> frozenset[int]:
        """Return the labels of all the tensors."""
        return frozenset().union(*(self._labels.get(_storage(each), ()) for each in tensors))

    def require(self, labels: frozenset[int], boundary: int) -> None:
        """Refuse labels of other boundaries; note those of the tokens."""
        if labels - {boundary, _TOKENS, _UNKNOWN}:
            raise self.refusal()
        self.needs_tokens |= _TOKENS in labels

    def enter(self, index: int) -> Callable[..., tuple[Any, Any]]:
        """Return the hook that checks a layer's arguments."""

        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
            if index == 0:
                hidden = args[0] if args else kwargs["hidden_states"]
                self.boundaries.append(self._boundary(hidden))
                started = hidden.clone()
                self.label([started], {0})
                args = (started, *args[1:]) if args else args
                kwargs = kwargs if args else {**kwargs, "hidden_states": started}
            self.require(self.labels_of(_tensors((args, kwargs))), index)
            self._inside = index
            return args, kwargs

        return hook

    def leave(self, index: int) -> Callable[..., None]:
        """Return the hook that labels a layer's output."""

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._inside = None
            self.boundaries.append(self._boundary(output))
            self.label(_tensors(output), {index + 1})

        return hook

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        given = _tensors((args, kwargs))
        labels = self.labels_of(given)
        if self._inside is not None:
            self.require(labels, self._inside)
        is_meta = any(each.is_meta for each in given)
        if "device" in kwargs:
            kwargs["device"] = torch.device("meta" if is_meta else "cpu")
        if func is torch.ops.aten._local_scalar_dense.default:
            if _UNKNOWN in labels:
                raise self.refusal()
            self.needs_tokens |= _TOKENS in labels
        changed = _changed(func, args)
        if is_meta and changed is not None and not changed.is_meta:
            self.label([changed], labels | {_UNKNOWN})
            return changed
        if is_meta:
            args, kwargs = tree_map_only(torch.Tensor, _on_meta, (args, kwargs))
        output = func(*args, **kwargs)
        self.label(_tensors(output), labels)
        return output

    def _boundary(self, output: Any) -> Boundary:
        parts: list[HandedOn | None] = []
        for each in _outputs(output):
            if each is None:
                parts.append(None)
                continue
            if not isinstance(each, torch.Tensor):
                raise self.refusal()
            shape = tuple(each.shape)
            seq_len = len(self._kept[0][0])
            is_flat = shape[:1] == (_BATCH * seq_len,)
            if not is_flat and shape[:2] != (_BATCH, seq_len):
                raise self.refusal()
            tail = shape[1:] if is_flat else shape[2:]
            parts.append(HandedOn(tail=tail, dtype=each.dtype, is_flat=is_flat))
        if parts[0] is None:
            raise self.refusal()
        return Boundary(parts=tuple(parts), is_tuple=isinstance(output, tuple))


def _outputs(output: Any) -> tuple[Any, ...]:
    return output if isinstance(output, tuple) else (output,)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [each for each in tree_flatten(value)[0] if isinstance(each, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.is_meta else torch.empty_like(tensor, device="meta")


def _changed(func: Any, args: Any) -> torch.Tensor | None:
    """Return the tensor that an operation changes in place."""
    is_changed = func._schema.arguments and func._schema.arguments[0].alias_info is not None
    if is_changed and func._schema.arguments[0].alias_info.is_write:
        return args[0]  # type: ignore[no-any-return]
    return None
