"""Map from tensors on disk to parameters, by transformers' own conversion rules."""

import copy
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from moe_tool.errors import CorruptArtifactError, UnsupportedModelError
from moe_tool.formats.safetensors_index import Checkpoint, TensorInfo
from moe_tool.models.config_dialects import TENSOR_PREFIXES
from moe_tool.models.moe_layers import (
    MoeLayerModules,
    expert_parameters,
    find_moe_layers,
)
from moe_tool.models.text_part import left_out
from moe_tool.models.unused_tensors import find_unused, require_float

_EXPERT_ID = re.compile(r"experts\.(\d{1,6})\.")
_NOTHING: Mapping[str, Collection[str]] = MappingProxyType({})
_HINT = "download the checkpoint again; it must be the one that config.json describes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A tensor on disk, with the pattern of its conversion rule; None if it is only renamed."""

    name: str
    pattern: str | None


class TensorMap:
    """Map of one checkpoint, from its headers only."""

    def __init__(
        self,
        model: PreTrainedModel,
        checkpoint: Checkpoint,
        *,
        apart: Mapping[str, Collection[str]] = _NOTHING,
    ) -> None:
        """Sort the checkpoint's tensors by the parameter that they belong to.

        Args:
            model: a model on the meta device, with the experts' parameters.
            checkpoint: a whole checkpoint, or one without the routed experts.
            apart: parameters stored in this tool's own format, with the names of their tensors,
                to leave out.
        """
        mapping = get_model_conversion_mapping(model)
        self._model = model
        self._checkpoint = checkpoint
        self._apart = apart
        self._renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
        self._prefix = TENSOR_PREFIXES.get(model.config.model_type, "")
        state = model.state_dict()
        self._shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self._floats = {name for name, tensor in state.items() if tensor.is_floating_point()}
        self._meta_state = {**state, **dict.fromkeys(left_out(model), True)}
        self._full_names: dict[tuple[int, str], str] = {}
        module_names = {module: name for name, module in model.named_modules()}
        self.moe_layers: dict[int, MoeLayerModules] = {}
        for modules in find_moe_layers(model):
            self.moe_layers[modules.layer] = modules
            for parameter in expert_parameters(modules):
                full_name = f"{module_names[modules.experts]}.{parameter}"
                self._full_names[modules.layer, parameter] = full_name
        self._expert_names = frozenset(self._full_names.values())
        self.skeleton: dict[str, list[Piece]] = {}
        """First parameter made from a group of tensors -> the group"""
        self._unused: dict[str, str] = {}
        """Tensor that nothing uses -> what it would be in the model"""
        self._experts: dict[str, dict[int | None, list[Piece]]] = {}
        """Expert parameter -> expert (None: stacked on disk) -> tensors"""
        self._sort()
        self._meta_state = {}

    def find_unused(self) -> tuple[str, ...]:
        """Return the tensors of the model's modules that nothing uses; see `find_unused`."""
        return find_unused(self._model, self._unused)

    def skeleton_names(self) -> list[str]:
        """Return the sorted on-disk names of all tensors needed besides the routed experts."""
        return sorted(piece.name for pieces in self.skeleton.values() for piece in pieces)

    def expert_pieces(self, layer: int, parameter: str, expert: int) -> tuple[list[Piece], bool]:
        """Return the tensors of one expert's parameter, and whether they contain all experts."""
        by_expert = self._experts[self._full_names[layer, parameter]]
        if None in by_expert:
            return by_expert[None], True
        return by_expert[expert], False

    def pieces_of_experts(self, layer: int, parameter: str) -> list[list[Piece]]:
        """Return `expert_pieces` of every expert; one list if they lie in the same tensors."""
        return list(self._experts[self._full_names[layer, parameter]].values())

    def expert_tensor_names(self, layer: int) -> list[str]:
        """Return the on-disk names, sorted, of all routed experts of one layer."""
        names: set[str] = set()
        for (of_layer, _), full_name in self._full_names.items():
            if of_layer == layer:
                groups = self._experts.get(full_name, {}).values()
                names.update(piece.name for pieces in groups for piece in pieces)
        return sorted(names)

    def convert(
        self, target: str, pieces: Sequence[Piece], tensors: Sequence[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Return the parameters made from a group of tensors, by full name.

        Args:
            target: the first of these parameters.
            pieces: the group.
            tensors: one per piece, as read, or on the meta device to get shapes only.
        """
        pattern = pieces[0].pattern
        if pattern is None:
            return {target: tensors[0]}
        found = next(rule for rule in self._converters if pattern in rule.source_patterns)
        rule = copy.deepcopy(found)  # it collects tensors in itself
        for operation in rule.operations:
            if getattr(operation, "check_dims", False):
                self._settle_transpose(operation, target, pieces)
        for piece, tensor in zip(pieces, tensors, strict=True):
            read: Any = partial(_same, tensor)  # rules take callables where they may read late
            rule.add_tensor(target, piece.name, str(piece.pattern), read)
        made = rule.convert(target, model=self._model, config=self._model.config)
        return {
            name: value[0] if isinstance(value, list) else value for name, value in made.items()
        }

    def _settle_transpose(self, operation: Any, target: str, pieces: Sequence[Piece]) -> None:
        """Let a transpose that depends on the whole tensor's shape act alike on a part of it.

        Square matrices do not tell, but those of one module are never all square, and all of them
        are stored alike.
        """
        module = target.rpartition(".")[0]
        stored = {target: pieces} | {
            name: groups[None]
            for name, groups in self._experts.items()
            if name.rpartition(".")[0] == module and None in groups
        }
        operation.check_dims = False
        if all(self._info(own[0]).shape == self._shapes[name] for name, own in stored.items()):
            operation.dim1 = operation.dim0

    def convert_expert(
        self, layer: int, parameter: str, pieces: Sequence[Piece], tensors: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Return one expert's parameter, in the module's orientation, from tensors as read."""
        if pieces[0].pattern is None:
            return tensors[0]
        target = self._full_names[layer, parameter]
        made = self.convert(target, pieces, tensors)[target]
        return made[0] if made.ndim > len(self._shapes[target]) - 1 else made

    def check_skeleton(self) -> set[str]:
        """Compare names and shapes of everything but the routed experts with the model.

        Returns:
            Parameters that the checkpoint lacks because they are tied to one that it has.

        Raises:
            CorruptArtifactError: a tensor is missing or has another shape; the first is named.
        """
        made: set[str] = set()
        for target, pieces in self.skeleton.items():
            made.update(self._check_group(target, pieces))
        there = made | self._expert_names | self._apart.keys()
        missing = {name for name in self._shapes if name not in there}
        excused = set()
        for group in tied_groups(self._model):
            if made.intersection(group):
                excused |= missing.intersection(group)
        for name in self._shapes:
            if name in missing - excused:
                raise self._lacking(name)
        return excused

    def made_shapes(self, target: str) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the parameters made from a group of `skeleton`."""
        pieces = self.skeleton[target]
        return self._convert_shapes(target, pieces, self._metas(pieces), self._shapes[target])

    def check_experts(self) -> None:
        """Compare names and shapes of all routed experts with the model.

        Raises:
            UnsupportedModelError: layers have different numbers of experts.
            CorruptArtifactError: a tensor is missing or has another shape; the first is named.
        """
        self._require_even_layers()
        for full_name in self._full_names.values():
            by_expert = self._experts.get(full_name)
            if not by_expert:
                raise self._lacking(full_name)
            if None in by_expert:
                self._check_stacked(full_name, by_expert)
            else:
                self._check_separate(full_name, by_expert)

    def _lacking(self, name: str) -> CorruptArtifactError:
        return CorruptArtifactError(
            f"the checkpoint lacks a tensor for {name}, "
            f"wanted shape {list(self._shapes[name])}, found none",
            hint=self._hint(),
        )

    def _hint(self) -> str:
        """Return what helps where a tensor is missing, which may be the index's fault alone."""
        remarks = "; ".join(self._checkpoint.remarks)
        index = "download the index again, with the shards that it names"
        return f"{index}: {remarks}" if remarks else _HINT

    def _require_even_layers(self) -> None:
        """Refuse layers pruned to different numbers of experts, numbered without gaps."""
        counts: dict[int, int] = {}
        for (layer, _), full_name in self._full_names.items():
            experts = set(self._experts.get(full_name, {}))
            if experts and experts == set(range(len(experts))):
                counts.setdefault(layer, len(experts))
        first = next(iter(counts), None)
        for layer, count in counts.items():
            if first is not None and count != counts[first]:
                raise UnsupportedModelError(
                    f"layer {first} has {counts[first]} experts and layer {layer} has {count}: "
                    "layers with different numbers of experts are not read",
                    hint="use a version with the same number in every layer; if config.json has "
                    "one number and the model was not pruned, download the checkpoint again",
                )

    def _sort(self) -> None:
        apart = {name for names in self._apart.values() for name in names}
        names = self._checkpoint.tensors.keys() - apart
        of_whole = {name for name in names if self._prefix and name.startswith(self._prefix)}
        for name in sorted(of_whole or names, key=dot_natural_key):
            target, pattern = self._rename(name)
            piece = Piece(name=name, pattern=pattern)
            if target in self._expert_names:
                match = _EXPERT_ID.search(name) if pattern is not None else None
                expert = int(match.group(1)) if match else None
                self._experts.setdefault(target, {}).setdefault(expert, []).append(piece)
            elif target in self._shapes:
                self.skeleton.setdefault(target, []).append(piece)
            elif target not in self._meta_state:  # else of a part that sees or hears
                self._unused[name] = target

    def _rename(self, name: str) -> tuple[str, str | None]:
        base = self._model.base_model_prefix
        rules = (self._renamings, self._converters)
        name = name.removeprefix(self._prefix)
        target, pattern = rename_source_key(name, *rules, base, self._meta_state)
        if target not in self._meta_state and name in self._meta_state:
            return rename_source_key(name, [], [], base, self._meta_state)
        return target, pattern

    def _check_group(self, target: str, pieces: Sequence[Piece]) -> set[str]:
        if pieces[0].pattern is None and len(pieces) > 1:
            names = " and ".join(piece.name for piece in pieces)
            raise CorruptArtifactError(f"{names} are the same tensor of the model", hint=_HINT)
        if target in self._floats:
            for piece in pieces:
                require_float(self._info(piece))
        made = self._convert_shapes(target, pieces, self._metas(pieces), self._shapes[target])
        for name, shape in made.items():
            self._require_shape(pieces, found=shape, wanted=self._shapes.get(name, shape))
        return set(made)

    def _check_stacked(
        self, full_name: str, by_expert: Mapping[int | None, Sequence[Piece]]
    ) -> None:
        pieces = by_expert[None]
        shape = self._shapes[full_name]
        if len(by_expert) > 1:
            raise CorruptArtifactError(
                f"{pieces[0].name} holds all experts and others hold single ones", hint=_HINT
            )
        if pieces[0].pattern is None and len(pieces) > 1:
            raise CorruptArtifactError(
                f"{pieces[0].name} and {pieces[1].name} are the same tensor of the model",
                hint=_HINT,
            )
        made = self._convert_shapes(full_name, pieces, self._metas(pieces), shape)
        self._require_shape(pieces, found=made.get(full_name, ()), wanted=shape)

    def _check_separate(
        self, full_name: str, by_expert: Mapping[int | None, Sequence[Piece]]
    ) -> None:
        shape = self._shapes[full_name]
        for expert in range(shape[0]):
            if expert not in by_expert:
                raise CorruptArtifactError(
                    f"the checkpoint lacks expert {expert} of {full_name}, "
                    f"wanted {shape[0]} experts, found {len(by_expert)}",
                    hint=self._hint(),
                )
        if len(by_expert) > shape[0]:
            extra = sorted(set(by_expert) - set(range(shape[0])), key=str)[0]
            raise CorruptArtifactError(
                f"{by_expert[extra][0].name} is one expert too many, "
                f"wanted {shape[0]}, found {len(by_expert)}",
                hint=_HINT,
            )
        first = by_expert[0]
        made = self._convert_shapes(full_name, first, self._metas(first), shape[1:])
        found = made.get(full_name, ())
        self._require_shape(first, found=found[1:], wanted=shape[1:])
        for expert in range(1, shape[0]):
            self._require_alike(first, by_expert[expert])

    def _require_alike(self, first: Sequence[Piece], other: Sequence[Piece]) -> None:
        if [piece.pattern for piece in other] != [piece.pattern for piece in first]:
            raise CorruptArtifactError(
                f"the expert of {other[0].name} has {len(other)} tensors, wanted {len(first)}",
                hint=self._hint(),
            )
        for piece, model_piece in zip(other, first, strict=True):
            wanted = self._info(model_piece).shape
            self._require_shape([piece], found=self._info(piece).shape, wanted=wanted)

    def _require_shape(
        self, pieces: Sequence[Piece], *, found: Sequence[int], wanted: Sequence[int]
    ) -> None:
        if tuple(found) != tuple(wanted):
            names = " + ".join(piece.name for piece in pieces)
            raise CorruptArtifactError(
                f"{names} does not fit the model: wanted {list(wanted)}, found {list(found)}",
                hint=_HINT,
            )

    def _convert_shapes(
        self,
        target: str,
        pieces: Sequence[Piece],
        metas: Sequence[torch.Tensor],
        wanted: Sequence[int],
    ) -> dict[str, tuple[int, ...]]:
        try:
            made = self.convert(target, pieces, metas)
        except (RuntimeError, ValueError, IndexError, StopIteration) as error:
            found = " + ".join(str(list(self._info(piece).shape)) for piece in pieces)
            names = " + ".join(piece.name for piece in pieces)
            raise CorruptArtifactError(
                f"{names} does not fit the model: wanted {list(wanted)}, found {found}", hint=_HINT
            ) from error
        return {name: tuple(tensor.shape) for name, tensor in made.items()}

    def _metas(self, pieces: Sequence[Piece]) -> list[torch.Tensor]:
        return [torch.empty(self._info(piece).shape, device="meta") for piece in pieces]

    def _info(self, piece: Piece) -> TensorInfo:
        return self._checkpoint.tensors[piece.name]


def tied_groups(model: PreTrainedModel) -> list[tuple[str, ...]]:
    """Return groups of tied parameters, each with the one that the others are tied to first."""
    groups: dict[str, list[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        groups.setdefault(source, [source]).append(target)
    return [tuple(group) for group in groups.values()]


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
