"""Loader of everything but the routed experts: check and measure, then read tensor by tensor."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from moe_tool.artifacts.bundle_manifest import SkeletonLinear
from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.artifacts.precision import NativePrecision, Precision
from moe_tool.budget.table_choice import RowsRequest
from moe_tool.errors import CorruptArtifactError
from moe_tool.formats.hostile_file import quoted
from moe_tool.formats.integer_parts import integer_parts, join_integer_parts
from moe_tool.formats.safetensors_index import Checkpoint
from moe_tool.formats.table_rows import TableRows
from moe_tool.models.architecture import structure
from moe_tool.models.expert_source import expert_dtype
from moe_tool.models.generation_settings import read_generation_settings
from moe_tool.models.kept_matrices import kept_matrices
from moe_tool.models.meta_model import build_meta_model
from moe_tool.models.moe_layers import (
    MoeLayerModules,
    decoder_layers,
    decoder_prefix,
)
from moe_tool.models.row_tables import RowTable, find_tables, put_rows
from moe_tool.models.skeleton import (
    Skeleton,
    assign,
    hook_routers,
    make_unsaved_buffers,
    read_group,
    remove_experts,
)
from moe_tool.models.skeleton_checks import require_loaded, require_shape
from moe_tool.models.skeleton_source import linear_shapes
from moe_tool.models.stored_formats.logical_checkpoint import LogicalCheckpoint
from moe_tool.models.stored_modules import StoredWeight, put_stored, stored_weight
from moe_tool.models.tensor_map import TensorMap, tied_groups
from moe_tool.quantization.weights import FloatWeight

_NARROW = {"BF16": torch.bfloat16, "F16": torch.float16}
_REPACK = "remove the folder and pack the bundle again with moe-tool pack"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """One read: a group of tensors, or a matrix in codes, of a bundle or of a checkpoint."""

    target: str
    form: Literal["floats", "integer", "kept"]
    names: tuple[str, ...]
    """Names of the tensors"""
    held_bytes: int
    """Bytes once loaded"""


class SkeletonLoader:
    """A skeleton that is checked against its model but not read yet.

    Matrices in codes, and matrices and input embedding of floats narrower than float32, stay in
    their stored form; everything else becomes float32.
    """

    def __init__(
        self,
        folder: Path,
        checkpoint: Checkpoint,
        *,
        shape: MoeShape | None = None,
        precision: Precision = NativePrecision(),  # noqa: B008 (frozen)
        linears: Sequence[SkeletonLinear] = (),
    ) -> None:
        """Check headers and config without reading tensors.

        Args:
            folder: holds config.json and possibly generation_config.json.
            checkpoint: a whole checkpoint, or a bundle's skeleton; owned by the caller.
            shape: shape of a model whose experts are elsewhere; None: read from the checkpoint.
            precision: precision of `linears`.
            linears: matrices stored as codes.

        Raises:
            NotFoundError, UnsupportedModelError: as `build_meta_model`.
            CorruptArtifactError: a tensor is missing, has another shape or is unknown.
            WrongModelError: config.json does not match `shape`.
        """
        self._folder, self._checkpoint, self._precision = folder, checkpoint, precision
        self._model = build_meta_model(folder)
        self._linears = {linear.parameter: linear for linear in linears}
        apart = {name: self._part_names(linear) for name, linear in self._linears.items()}
        self._map = TensorMap(self._model, checkpoint, apart=apart)
        self._layers = tuple(self._map.moe_layers.values())
        self._shapes = linear_shapes(self._model, self._layers)
        if shape is None:
            self._missing = self._map.check_skeleton()
            dtype = expert_dtype(self._map, checkpoint)
            self._shape = structure(self._model, self._layers[0], dtype=dtype)
        else:
            self._shape = require_shape(self._model, self._layers, shape)
            self._missing = self._check_bundle()
        self._narrow = {*self._shapes, *_table(self._model)}
        tied = {name for group in tied_groups(self._model) for name in group}
        needed = tied if self._missing else set()  # as the embedding that a head is tied to
        self._kept = kept_matrices(self._map, checkpoint, self._shapes, excluded=needed)
        self._steps = sorted(self._plan(), key=self._position)
        self.tables = self.tables_beside(self._linears)
        """Embedding tables that `load` can leave on disk, by parameter"""

    @property
    def config(self) -> PreTrainedConfig:
        """Configuration of the model."""
        return self._model.config

    @property
    def model(self) -> PreTrainedModel:
        """The model, whose tensors may not be loaded yet."""
        return self._model

    @property
    def layers(self) -> tuple[MoeLayerModules, ...]:
        """Modules of every MoE layer, ascending; their tensors may not be loaded yet."""
        return self._layers

    @property
    def held_bytes(self) -> int:
        """Bytes of the loaded skeleton."""
        return sum(step.held_bytes for step in self._steps)

    @property
    def kept_bytes(self) -> dict[str, int]:
        """Tensor -> bytes of the loaded matrix, of those that stay in a checkpoint's codes."""
        return {self._map.skeleton[name][0].name: size for name, size in self._kept.items()}

    @property
    def largest_bytes(self) -> int:
        """Stored bytes of the largest group of tensors, which loading needs beside `held_bytes`."""
        return self.largest_without(())

    def largest_without(self, tables: Collection[str]) -> int:
        """Return `largest_bytes` where these of `tables` are left on disk."""
        steps = (step for step in self._steps if step.target not in tables)
        return max((self._reading_bytes(step) for step in steps), default=0)

    def tables_beside(self, coded: Collection[str]) -> dict[str, RowTable]:
        """Return what `tables` would be in a bundle with these matrices as codes."""
        floats = {step.target: step.held_bytes for step in self._steps if step.form == "floats"}
        return find_tables(self._model, self._map, self._checkpoint, held=floats, coded=coded)

    def choose(self, rows: RowsRequest) -> tuple[str, ...]:
        """Return those of `tables` that a request may leave on disk."""
        return rows.choose({name: table.held_bytes for name, table in self.tables.items()})

    def in_turn_bytes(self, on_disk: Collection[str] = ()) -> int:
        """Return the most bytes that `load_in_turn` and a forward hold of the skeleton, reading
        included, with these of `tables` on disk."""
        held = {
            layer: sum(step.held_bytes for step in steps)
            for layer, steps in self._steps_by_layer(on_disk).items()
        }
        return held.pop(None, 0) + max(held.values(), default=0) + self.largest_without(on_disk)

    def load(self, on_disk: Mapping[str, TableRows] = MappingProxyType({})) -> Skeleton:
        """Read the skeleton, in at most `held_bytes` plus `largest_bytes`; call it once.

        Args:
            on_disk: those of `tables` that stay there, opened.

        Raises:
            CorruptArtifactError: a tensor is damaged.
            StorageError: a tensor cannot be read.
        """
        for parameter, rows in on_disk.items():
            put_rows(self._model, parameter, rows)
        found = self._begin(step for step in self._steps if step.target not in on_disk)
        require_loaded(self._model)
        generation = read_generation_settings(self._folder)
        self._model.generation_config = generation or self._model.generation_config
        return found

    def load_in_turn(self, on_disk: Mapping[str, TableRows] = MappingProxyType({})) -> Skeleton:
        """Read everything outside the decoder layers, for one forward of the whole model.

        A layer is read when the forward reaches it, and emptied when it is done; in the end, so is
        the model. Call this once.

        Args:
            on_disk: as in `load`.

        Raises:
            CorruptArtifactError, StorageError: as `load`, here and in the forward.
        """
        for parameter, rows in on_disk.items():
            put_rows(self._model, parameter, rows)
        by_layer = self._steps_by_layer(on_disk)
        found = self._begin(by_layer.get(None, []))
        for index, layer in enumerate(decoder_layers(self._model)):
            steps = by_layer.get(index, [])
            layer.register_forward_pre_hook(partial(self._load_layer, steps))
            layer.register_forward_hook(_empty)
        self._model.register_forward_hook(_empty)  # it refers to itself, and would stay a while
        return found

    def _begin(self, steps: Iterable[_Step]) -> Skeleton:
        remove_experts(self._layers)
        make_unsaved_buffers(self._model)
        self._load_steps(steps)
        self._tie()
        hook_routers(self._layers)
        return Skeleton(model=self._model, shape=self._shape, layers=self._layers)

    def _load_steps(self, steps: Iterable[_Step]) -> None:
        for step in steps:
            if step.form == "integer":
                self._load_codes(step.target)
            elif step.form == "kept":
                self._load_kept(step.target)
            else:
                self._load_group(step.target)

    def _load_layer(self, steps: Iterable[_Step], layer: nn.Module, args: object) -> None:
        self._load_steps(steps)

    def _steps_by_layer(self, on_disk: Collection[str]) -> dict[int | None, list[_Step]]:
        """Group the steps of what is loaded by decoder layer; None: all outside layers."""
        prefix = decoder_prefix(self._model)
        found: dict[int | None, list[_Step]] = {}
        for step in self._steps:
            if step.target in on_disk:
                continue
            is_inside = step.target.startswith(prefix)
            layer = int(step.target.removeprefix(prefix).split(".")[0]) if is_inside else None
            found.setdefault(layer, []).append(step)
        return found

    def _reading_bytes(self, step: _Step) -> int:
        """Return the bytes held while a group is read: its tensors, and one as it is decoded, which
        takes more than keeping its codes."""
        made = sum(self._checkpoint.tensors[name].size_bytes for name in step.names)
        return made + max(self._checkpoint.extra_bytes(name) for name in step.names)

    def _part_names(self, linear: SkeletonLinear) -> tuple[str, ...]:
        assert self._precision.kind == "integer"
        parts = integer_parts(linear.parameter, linear.n_outputs, linear.n_inputs, self._precision)
        return tuple(part.name for part in parts)

    def _check_bundle(self) -> set[str]:
        """Refuse a bundle's skeleton with missing or extra tensors.

        Returns:
            Parameters that it lacks because they are tied to one that it has.
        """
        self._require_fit()
        parts = {part for linear in self._linears.values() for part in self._part_names(linear)}
        extra = self._checkpoint.tensors.keys() - parts - set(self._map.skeleton_names())
        if extra:
            raise CorruptArtifactError(
                f"the skeleton of {self._folder} holds {quoted(min(extra))}, "
                "which this model does not use",
                hint=_REPACK,
            )
        try:
            return self._map.check_skeleton()
        except CorruptArtifactError as error:
            raise CorruptArtifactError(
                f"the skeleton of {self._folder}: {error.message}", hint=_REPACK
            ) from error

    def _require_fit(self) -> None:
        """Refuse codes of an unknown matrix or of another shape, and matrices stored twice."""
        for name, linear in self._linears.items():
            found, wanted = (linear.n_outputs, linear.n_inputs), self._shapes.get(name)
            if wanted is None:
                reason = "which this model does not have, or not as codes"
            elif found != wanted:
                reason = f"of shape {list(found)}, the model wants {list(wanted)}"
            elif name in self._map.skeleton:
                reason = "which it holds as floats too"
            else:
                continue
            raise CorruptArtifactError(
                f"the skeleton of {self._folder} holds codes of {quoted(name)}, {reason}",
                hint=_REPACK,
            )

    def _plan(self) -> Iterator[_Step]:
        for target, pieces in self._map.skeleton.items():
            names = tuple(piece.name for piece in pieces)
            if target in self._kept:
                held = self._kept[target]
                yield _Step(target=target, form="kept", names=names, held_bytes=held)
                continue
            dtypes = {self._checkpoint.tensors[name].dtype for name in names}
            held = 0
            for name, shape in self._map.made_shapes(target).items():
                held += torch.Size(shape).numel() * self._item_bytes(name, dtypes)
            yield _Step(target=target, form="floats", names=names, held_bytes=held)
        for name, linear in self._linears.items():
            names = self._part_names(linear)
            held = sum(self._checkpoint.tensors[part].size_bytes for part in names)
            yield _Step(target=name, form="integer", names=names, held_bytes=held)

    def _item_bytes(self, name: str, dtypes: set[str]) -> int:
        if name in self._narrow and dtypes <= _NARROW.keys() and len(dtypes) == 1:
            return 2
        owner, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(owner)
        tensor = module._parameters.get(leaf, module._buffers.get(leaf))
        assert tensor is not None
        return tensor.dtype.itemsize

    def _position(self, step: _Step) -> tuple[str, int]:
        """Return file and offset of a step's first tensor, to read files in order."""
        info = self._checkpoint.tensors[step.names[0]]
        return str(info.file), info.offset

    def _load_codes(self, name: str) -> None:
        linear = self._linears[name]
        assert self._precision.kind == "integer"
        weight = join_integer_parts(
            name, linear.n_outputs, linear.n_inputs, self._precision, self._checkpoint.read
        )
        put_stored(self._model, name, weight)

    def _load_kept(self, name: str) -> None:
        assert isinstance(self._checkpoint, LogicalCheckpoint)
        weight = self._checkpoint.read_kept(self._map.skeleton[name][0].name)
        assert weight is not None and weight.size_bytes == self._kept[name]
        put_stored(self._model, name, weight)

    def _load_group(self, target: str) -> None:
        made = read_group(self._map, self._checkpoint, target)
        for name in list(made):
            value = made.pop(name)
            if name in self._narrow and value.dtype in _NARROW.values():
                put_stored(self._model, name, FloatWeight(values=value.contiguous()))
            else:
                assign(self._model, name, value)

    def _tie(self) -> None:
        """Tie parameters, including those replaced by stored modules."""
        model = self._model
        for group in tied_groups(model):
            stored = {name: stored_weight(model, name) for name in group}
            if all(weight is None for weight in stored.values()):
                continue  # transformers ties them
            for name in group[1:]:
                model.all_tied_weights_keys.pop(name)
            self._tie_stored([name for name in group if name not in self._linears])
        model.tie_weights(missing_keys=set(self._missing), recompute_mapping=False)

    def _tie_stored(self, group: Sequence[str]) -> None:
        source = next(name for name in group if name not in self._missing)
        weight = stored_weight(self._model, source)
        for name in group:
            if name in self._missing and weight is None:
                owner, _, leaf = name.rpartition(".")
                parameter = self._model.get_parameter(source)
                self._model.get_submodule(owner)._parameters[leaf] = parameter
            elif name in self._missing or _are_equal(weight, stored_weight(self._model, name)):
                assert weight is not None
                put_stored(self._model, name, weight)


def _are_equal(one: StoredWeight | None, other: StoredWeight | None) -> bool:
    if not isinstance(one, FloatWeight) or not isinstance(other, FloatWeight):
        return False
    return one is not other and torch.equal(one.values, other.values)


def _table(model: PreTrainedModel) -> list[str]:
    """Return the name of the input embedding's weight, unless its lookup is not a plain one."""
    embedding = model.get_input_embeddings()
    if type(embedding) is not nn.Embedding or embedding.max_norm is not None:
        return []
    return [f"{name}.weight" for name, module in model.named_modules() if module is embedding]


def _empty(module: nn.Module, args: object, output: object) -> None:
    """Drop the weights of a module that has run, wherever else its parts are referred to."""
    for part in module.modules():
        part._parameters.clear()
        for name in ("stored", "_native", "_native_of"):  # of a StoredLinear
            part.__dict__.pop(name, None)
