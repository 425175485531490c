"""Float weights that can be trained beside the codes: norms and routers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from moe_tool.models.layer_stream import LayerStream, StreamedLayer
from moe_tool.models.moe_layers import decoder_prefix, unsupported

Kind = Literal["norms", "router"]
Values = Mapping[str, torch.Tensor]
"""Tensor name -> float32 values"""


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatPlace:
    """One trainable tensor."""

    name: str
    """Name on disk"""
    parameter: str
    """Name in transformers' model"""
    kind: Kind
    layer: int | None
    """Decoder layer; None: behind the last one"""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FloatWeights:
    """Trainable tensors of a model, with their values in the checkpoint."""

    places: tuple[FloatPlace, ...]
    start: Values

    def of_layer(self, layer: int | None) -> tuple[FloatPlace, ...]:
        """Return the tensors of a decoder layer; None: those behind the last one."""
        return tuple(place for place in self.places if place.layer == layer)

    def blended(self, values: Values, shares: Mapping[Kind, float]) -> Values:
        """Return the tensors a share of the way from the start to `values`, by kind."""
        weight = {place.name: shares.get(place.kind, 0.0) for place in self.places}
        return _Blended(start=self.start, end=values, weight=weight)


@dataclass(frozen=True, slots=True, eq=False)
class _Blended(Mapping[str, torch.Tensor]):
    """Tensors between two others, made when they are asked for: many mixtures take no memory."""

    start: Values
    end: Values
    weight: Mapping[str, float]

    def __getitem__(self, name: str) -> torch.Tensor:
        share = self.weight[name]
        return torch.lerp(self.start[name], self.end[name], share) if share else self.start[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.start)

    def __len__(self) -> int:
        return len(self.start)


def find_floats(stream: LayerStream, *, norms: bool, router: bool) -> FloatWeights:
    """Return the norms and routers of a model; loads every layer's skeleton once.

    Raises:
        UnsupportedModelError: a layer lacks a wanted kind, or does not store it as it uses it.
    """
    places: list[FloatPlace] = []
    start: dict[str, torch.Tensor] = {}

    def take(kind: Kind, layer: int | None, parameters: list[str]) -> None:
        named = {each: stream.stored_name(each) for each in parameters}
        if not named or None in named.values():
            where = "the last layer" if layer is None else f"layer {layer}"
            raise unsupported(
                stream.shape.model_type,
                f"the {kind} of {where} cannot be trained: no tensor of the checkpoint is what the "
                "model uses",
            )
        for parameter, name in named.items():
            assert name is not None
            places.append(FloatPlace(name=name, parameter=parameter, kind=kind, layer=layer))
            start[name] = stream.model.get_parameter(parameter).detach().float().clone()

    for layer in stream.layers():
        if norms:
            take("norms", layer.layer, list(_norms_of(stream, layer)))
        if router and layer.moe is not None:
            take("router", layer.layer, list(_router_of(stream, layer)))
    if norms and (last := list(_last_norms(stream))):
        take("norms", None, last)
    return FloatWeights(places=tuple(places), start=start)


def _norms_of(stream: LayerStream, layer: StreamedLayer) -> Iterator[str]:
    """Yield the parameters of a layer's norms, but for those of its router and experts."""
    inside: set[object] = set()
    if layer.moe is not None:
        inside = {*layer.moe.experts.modules(), *layer.moe.router.modules()}
    prefix = f"{decoder_prefix(stream.model)}{layer.layer}."
    for name, module in layer.module.named_modules(prefix=prefix.removesuffix(".")):
        if "Norm" in type(module).__name__ and module not in inside:
            for leaf, _ in module.named_parameters(recurse=False):
                yield f"{name}.{leaf}"


def _router_of(stream: LayerStream, layer: StreamedLayer) -> Iterator[str]:
    assert layer.moe is not None
    own = {id(each) for each in layer.moe.router.parameters()}
    return (name for name, each in stream.model.named_parameters() if id(each) in own)


def _last_norms(stream: LayerStream) -> Iterator[str]:
    """Yield the parameters of the norms beside the decoder layers."""
    prefix = decoder_prefix(stream.model)
    owner = prefix.removesuffix("layers.")
    for name, module in stream.model.named_modules():
        inside = name.removeprefix(owner)
        if name.startswith(owner) and "." not in inside and "Norm" in type(module).__name__:
            for leaf, _ in module.named_parameters(recurse=False):
                yield f"{name}.{leaf}"
