"""Embedding tables whose rows can be read from disk one by one, and lookups in them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_tool.budget.table_choice import RowsRequest
from moe_tool.formats.safetensors_index import Checkpoint, TensorInfo
from moe_tool.formats.table_rows import TableRows
from moe_tool.models.tensor_map import TensorMap, tied_groups

_FLOATS = frozenset({"F32", "BF16", "F16"})
_SCALE = "embed_scale"
"""Attribute of transformers' scaled embeddings, whose lookup multiplies the rows by it"""
_BLOCK_BYTES = 2**20
"""Size of the float32 rows in memory beside the result of a lookup"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowTable:
    """One table [V, d] that can stay on disk."""

    parts: tuple[TensorInfo, ...]
    """Tensors on disk, whose rows follow each other"""
    held_bytes: int
    """Bytes in memory if it is loaded"""


def find_tables(
    model: PreTrainedModel,
    tensor_map: TensorMap,
    checkpoint: Checkpoint,
    *,
    held: Mapping[str, int],
    coded: Collection[str],
) -> dict[str, RowTable]:
    """Return the tables that can stay on disk, by parameter.

    They are looked up by row only, and lie on disk as floats, row after row. A table that is also
    the head is read as a whole for every token.

    Args:
        model: a model on the meta device.
        tensor_map: checked map of `model` and `checkpoint`.
        checkpoint: the tensors on disk.
        held: bytes in memory of each group of `tensor_map.skeleton` that is loaded as floats.
        coded: parameters with codes of their own, which no other parameter's tensor makes.
    """
    tied = {
        name
        for group in tied_groups(model)
        if sum(name not in coded for name in group) > 1
        for name in group
    }
    found = {}
    for name, module in model.named_modules():
        parameter = f"{name}.weight"
        if not _is_lookup(module) or parameter in tied or parameter not in held:
            continue
        parts = _parts(tensor_map, checkpoint, parameter)
        if parts is not None:
            found[parameter] = RowTable(parts=parts, held_bytes=held[parameter])
    return found


def streamed_tables(
    model: PreTrainedModel, tensor_map: TensorMap, checkpoint: Checkpoint, rows: RowsRequest
) -> dict[str, RowTable]:
    """Return the tables of a checkpoint, loaded in float32, that a request leaves on disk.

    Args:
        model: a model on the meta device.
        tensor_map: checked map of `model` and `checkpoint`.
        checkpoint: a whole checkpoint.
        rows: the request.
    """
    names = {name for name, _ in model.named_parameters()} & tensor_map.skeleton.keys()
    held = {name: 4 * model.get_parameter(name).numel() for name in names}
    found = find_tables(model, tensor_map, checkpoint, held=held, coded=())
    return {name: found[name] for name in rows.choose({n: held[n] for n in found})}


def put_rows(model: PreTrainedModel, parameter: str, rows: TableRows) -> None:
    """Let an embedding read its rows from disk; changes the model."""
    module = model.get_submodule(parameter.rpartition(".")[0])
    assert isinstance(module, nn.Embedding)
    del module._parameters["weight"]
    module.__dict__["weight"] = torch.empty(rows.n_rows, rows.width, device="meta")
    module.__dict__["forward"] = RowsOnDisk(module, rows)


class RowsOnDisk:
    """Lookup of an embedding whose table stays on disk: each distinct row is read once a call."""

    def __init__(self, module: nn.Embedding, rows: TableRows) -> None:
        """Keep the embedding, which has no weight, and the open table."""
        self._module, self.rows = module, rows

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Return float32 [..., d] of ids [...].

        Raises:
            IndexError: an id is outside the table.
            CorruptArtifactError, StorageError: as `TableRows.read`.
        """
        unique, inverse = torch.unique(ids.reshape(-1), return_inverse=True)
        if len(unique) and not 0 <= int(unique[0]) <= int(unique[-1]) < self.rows.n_rows:
            raise IndexError(f"the table has rows 0 to {self.rows.n_rows - 1}")
        n_block = max(1, _BLOCK_BYTES // (4 * self.rows.width))
        out = torch.empty(len(inverse), self.rows.width, dtype=torch.float32)
        for begin in range(0, len(unique), n_block):
            looked_up = self._look_up(self.rows.read(unique[begin : begin + n_block]))
            if len(unique) <= n_block:
                torch.index_select(looked_up, 0, inverse, out=out)
            else:
                there = (inverse >= begin) & (inverse < begin + n_block)
                out[there] = looked_up[inverse[there] - begin]
        return out.view(*ids.shape, self.rows.width)

    def _look_up(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the embedding's own answer, with its scale, for every row."""
        module, state = self._module, self._module.__dict__
        empty, padding = state["weight"], module.padding_idx
        # A padding row counts in training only, but has to lie in the table.
        state["weight"], state["padding_idx"] = rows, None
        try:
            found: torch.Tensor = type(module).forward(module, torch.arange(len(rows)))
        finally:
            state["weight"], state["padding_idx"] = empty, padding
        return found


def _is_lookup(module: nn.Module) -> bool:
    """Return whether a module only looks rows up, and perhaps scales them."""
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return False
    return type(module) is nn.Embedding or hasattr(module, _SCALE)


def _parts(
    tensor_map: TensorMap, checkpoint: Checkpoint, parameter: str
) -> tuple[TensorInfo, ...] | None:
    """Return the tensors on disk that a table's rows lie in, in order; None if it is made in
    another way."""
    pieces = tensor_map.skeleton[parameter]
    places = [checkpoint.places(piece.name) for piece in pieces]
    parts = [place["values"] for place in places if place.keys() == {"values"}]
    if len(parts) < len(pieces) or len({part.dtype for part in parts}) > 1:
        return None
    if any(part.dtype not in _FLOATS or len(part.shape) != 2 for part in parts):
        return None
    order = _order(tensor_map, parameter, len(parts))
    ordered = [parts[at] for at in order]
    shape = (sum(part.shape[0] for part in ordered), parts[0].shape[1])
    if not ordered or tensor_map.made_shapes(parameter) != {parameter: shape}:
        return None
    return tuple(replace(part, file=Path(part.file).absolute()) for part in ordered)


def _order(tensor_map: TensorMap, parameter: str, n_parts: int) -> Sequence[int]:
    """Return the order in which a conversion puts tensors below each other; empty if it does
    something else with them, as small tensors in their place show."""
    probes = [torch.arange(6.0).view(2, 3) + 6 * at for at in range(n_parts)]
    try:
        made = tensor_map.convert(parameter, tensor_map.skeleton[parameter], probes)[parameter]
    except (RuntimeError, ValueError, IndexError, KeyError):  # it wants the real shapes
        return ()
    order = [int(first) // 6 for first in made.reshape(-1)[::6]]
    whole = sorted(order) == list(range(n_parts))
    if not whole or not torch.equal(made, torch.cat([probes[at] for at in order])):
        return ()
    return order
