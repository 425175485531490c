"""Reader of a checkpoint's skeleton by groups of tensors, for matrices that may be quantized."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_tool.budget.table_choice import AUTO_ROWS
from moe_tool.formats.safetensors_index import Checkpoint
from moe_tool.models.moe_layers import MoeLayerModules
from moe_tool.models.row_tables import streamed_tables
from moe_tool.models.tensor_map import TensorMap, tied_groups

_FLOATS = frozenset({"F32", "BF16", "F16"})
_WEIGHT = "weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearGroup:
    """Tensors on disk that make matrices which may be quantized, and nothing else."""

    target: str
    """Key of `TensorMap.skeleton`"""
    made_as: Mapping[str, str]
    """Matrix -> parameter that the tensors make; they differ if tied"""


class SkeletonSource:
    """Reader of everything but the experts of one checkpoint."""

    def __init__(
        self, model: PreTrainedModel, tensor_map: TensorMap, checkpoint: Checkpoint
    ) -> None:
        """Sort the skeleton's tensors without reading them.

        Args:
            model: a model on the meta device.
            tensor_map: checked map of `model` and `checkpoint`.
            checkpoint: stays open and owned by the caller.
        """
        self._map = tensor_map
        self._checkpoint = checkpoint
        self.shapes = linear_shapes(model, tensor_map.moe_layers.values())
        """Matrix that may be quantized -> (out, in)"""
        self.groups: list[LinearGroup] = []
        """Tensors that make these matrices, in the order of the model"""
        self.tensor_names: list[str] = tensor_map.skeleton_names()
        """On-disk names, sorted, of everything but the experts"""
        self.n_weights = sum(
            math.prod(checkpoint.tensors[name].shape) for name in self.tensor_names
        )
        """Numbers in everything but the experts"""
        tables = streamed_tables(model, tensor_map, checkpoint, AUTO_ROWS)
        self.n_loaded = self.n_weights - sum(
            math.prod(part.shape) for table in tables.values() for part in table.parts
        )
        """Numbers that a pass through the layers loads: of large tables it reads rows"""
        self.other_names: list[str] = self._sort(model)
        """Sorted names of tensors that are still needed when `groups` are quantized"""

    def read(self, group: LinearGroup) -> Iterator[tuple[str, torch.Tensor]]:
        """Read a group; yield its matrices by name, in the checkpoint's dtype."""
        pieces = self._map.skeleton[group.target]
        tensors = [self._checkpoint.read(piece.name) for piece in pieces]
        made = self._map.convert(group.target, pieces, tensors)
        del tensors
        for parameter, source in group.made_as.items():
            yield parameter, made[source]

    def group_names(self, group: LinearGroup) -> list[str]:
        """Return the on-disk names of the tensors that make a group."""
        return [piece.name for piece in self._map.skeleton[group.target]]

    def _sort(self, model: PreTrainedModel) -> list[str]:
        makes = {target: self._map.made_shapes(target) for target in self._map.skeleton}
        present = {name for made in makes.values() for name in made}
        copies = _copies(model, present)
        others: set[str] = set()
        for target, made in makes.items():
            pieces = self._map.skeleton[target]
            wanted = {name: name for name in made}
            wanted |= {name: source for name, source in copies.items() if source in made}
            as_codes = {name: source for name, source in wanted.items() if name in self.shapes}
            are_floats = all(self._checkpoint.tensors[p.name].dtype in _FLOATS for p in pieces)
            is_needed = not are_floats or as_codes.keys() != wanted.keys()
            if is_needed:
                others.update(piece.name for piece in pieces)
            # A head tied to the embedding gets codes of its own, as the embedding needs its floats.
            # Other groups that make more than such matrices stay native.
            if as_codes and are_floats and not (is_needed and self.shapes.keys() & made.keys()):
                self.groups.append(LinearGroup(target=target, made_as=MappingProxyType(as_codes)))
        return sorted(others)


def linear_shapes(
    model: PreTrainedModel, moe_layers: Iterable[MoeLayerModules]
) -> dict[str, tuple[int, int]]:
    """Return the (out, in) of weights that may be quantized, by name.

    They belong to `nn.Linear` modules, not to subclasses, outside routers and experts. Modules with
    one output are left out: they are gates, as sensitive and small as routers.
    """
    excluded: set[nn.Module] = set()
    for modules in moe_layers:
        excluded.update(modules.router.modules(), modules.experts.modules())
    found = {}
    for name, module in model.named_modules():
        if type(module) is nn.Linear and module not in excluded and module.out_features > 1:
            found[f"{name}.{_WEIGHT}"] = (module.out_features, module.in_features)
    return found


def _copies(model: PreTrainedModel, present: set[str]) -> dict[str, str]:
    """Return the present parameter that each missing one is tied to."""
    copies = {}
    for group in tied_groups(model):
        source = next((name for name in group if name in present), None)
        if source is not None:
            copies.update({name: source for name in group if name not in present})
    return copies
