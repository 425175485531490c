"""Reader of single experts of a checkpoint in canonical form, whatever the layout on disk."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from moe_tool.artifacts.moe_shape import FloatName
from moe_tool.artifacts.precision import KeptPrecision
from moe_tool.errors import CorruptArtifactError, UnsupportedModelError
from moe_tool.formats.kept_form import kept_precision, with_equal_groups
from moe_tool.formats.safetensors_index import Checkpoint, TensorInfo
from moe_tool.models.kept_rows import place_rows, row_order
from moe_tool.models.moe_layers import MoeLayerModules, expert_parameters
from moe_tool.models.stored_formats.logical_checkpoint import Form, LogicalCheckpoint
from moe_tool.models.tensor_map import Piece, TensorMap
from moe_tool.models.unused_tensors import require_float
from moe_tool.quantization.kept_codes import KeptWeight
from moe_tool.quantization.weights import FloatWeight

_FLOAT_NAMES: dict[str, FloatName] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class ExpertSource:
    """Reader of one expert at a time; no two experts share bytes."""

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint) -> None:
        """Map the checkpoint and check it.

        Args:
            model: a model on the meta device, with the experts' parameters.
            checkpoint: stays open and owned by the caller.

        Raises:
            CorruptArtifactError: an expert's tensor is missing or of another shape.
            UnsupportedModelError: the experts are not stored as floats.
        """
        self._checkpoint = checkpoint
        self._map = TensorMap(model, checkpoint)
        self._map.check_experts()
        self._parameters = {
            layer: tuple(expert_parameters(modules))
            for layer, modules in self._map.moe_layers.items()
        }
        self._dtype = getattr(torch, expert_dtype(self._map, checkpoint))
        self._orders: dict[tuple[object, ...], torch.Tensor | None] = {}
        self._kept_bytes: dict[tuple[tuple[Form, ...], ...], int | None] = {}
        self._transposed = {
            layer: is_transposed(modules) for layer, modules in self._map.moe_layers.items()
        }

    def read(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        """Read one expert's tensors.

        Args:
            layer: decoder-layer index.
            expert: 0 to E - 1.

        Returns:
            Contiguous tensors of `expert_dtype` by the experts module's parameter names:
            matrices [out, in], biases [out]. Rows of gate_up_proj are in the module's order.

        Raises:
            StorageError: the checkpoint cannot be read.
        """
        return {name: self._read(layer, name, expert) for name in self._parameters[layer]}

    @property
    def are_coded(self) -> bool:
        """Whether some experts are stored in codes that are decoded when they are read."""
        return isinstance(self._checkpoint, LogicalCheckpoint) and any(
            name in self._checkpoint.stored
            for layer in self._parameters
            for name in self.tensor_names(layer)
        )

    def kept_precision(self) -> KeptPrecision | None:
        """Return the precision of the experts' codes on disk; None: they are floats, or not all of
        them can be kept as they are.

        One expert of every layer is read; of the others, headers have to be alike.
        """
        found = set()
        for layer in self._parameters:
            if self._common_forms(layer) is None:
                return None
            weights = self.read_kept(layer, 0)
            try:
                found.add(None if weights is None else kept_precision(weights))
            except ValueError:
                return None
            if None in found:
                return None
        return found.pop() if len(found) == 1 else None

    def kept_bytes(self, layer: int) -> int | None:
        """Return the bytes in memory of each of a layer's experts as `read_kept` returns them.

        Expert 0 is read, unless that of a layer stored alike has been.

        Returns:
            None if they are floats, or not all of them can be kept.

        Raises:
            CorruptArtifactError, StorageError: as `read_kept`.
        """
        form = self._common_forms(layer)
        if form is None:
            return None
        if form not in self._kept_bytes:
            weights = self.read_kept(layer, 0)
            self._kept_bytes[form] = (
                None if weights is None else sum(each.size_bytes for each in weights.values())
            )
        return self._kept_bytes[form]

    def read_kept(self, layer: int, expert: int) -> dict[str, FloatWeight | KeptWeight] | None:
        """Read one expert's matrices in the codes on disk, and its vectors as `read` does.

        Returns:
            None if a matrix is stored as floats, or in codes that cannot be kept.

        Raises:
            CorruptArtifactError: a number is NaN or infinite.
            StorageError: the checkpoint cannot be read.
        """
        if not isinstance(self._checkpoint, LogicalCheckpoint):
            return None
        found: dict[str, FloatWeight | KeptWeight] = {}
        for name in self._parameters[layer]:
            pieces, is_stacked = self._map.expert_pieces(layer, name, expert)
            row = expert if is_stacked else None
            parts = [self._checkpoint.read_kept(piece.name, row=row) for piece in pieces]
            kept = [part for part in parts if part is not None]
            if not kept:
                found[name] = FloatWeight(values=self._read(layer, name, expert))
                if len(found[name].shape) == 2:
                    return None
                continue
            order = self._row_order(layer, name, expert, kept) if len(kept) == len(parts) else None
            if order is None:
                return None
            found[name] = place_rows(kept, order)
        return with_equal_groups(found)

    def places(self, layer: int, parameter: str, expert: int) -> dict[str, list[TensorInfo]]:
        """Return the tensors on disk that an expert's parameter is made from, by role, e.g. codes
        and scales; row by row of tensors that hold all experts."""
        pieces, is_stacked = self._map.expert_pieces(layer, parameter, expert)
        found: dict[str, list[TensorInfo]] = {}
        for piece in pieces:
            places = self._checkpoint.places(piece.name, row=expert if is_stacked else None)
            for role, info in places.items():
                found.setdefault(role, []).append(info)
        return found

    def _common_forms(self, layer: int) -> tuple[tuple[Form, ...], ...] | None:
        """Return the forms of a layer's codes and scales, parameter by parameter; None if its
        experts differ, or the checkpoint holds no codes."""
        if not isinstance(self._checkpoint, LogicalCheckpoint):
            return None
        found = []
        for name in self._parameters[layer]:
            forms = {
                tuple(self._checkpoint.form_of(piece.name) for piece in pieces)
                for pieces in self._map.pieces_of_experts(layer, name)
            }
            if len(forms) != 1:
                return None
            found.append(forms.pop())
        return tuple(found)

    def _row_order(
        self, layer: int, parameter: str, expert: int, parts: Sequence[KeptWeight]
    ) -> torch.Tensor | None:
        """Return how the parts' rows make a parameter.

        It is the same wherever the same rules convert tensors of the same shapes, so it is found
        once for all layers that are alike.
        """
        pieces, is_stacked = self._map.expert_pieces(layer, parameter, expert)
        alike = (
            parameter,
            self._transposed[layer],
            is_stacked,
            tuple(piece.pattern for piece in pieces),
            tuple((part.kind, part.shape, part.group) for part in parts),
        )
        if alike not in self._orders:

            def convert(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
                return self._converted(layer, parameter, pieces, tensors, is_stacked)

            self._orders[alike] = row_order(parts, convert)
        return self._orders[alike]

    def tensor_names(self, layer: int) -> list[str]:
        """Return the on-disk names, sorted, of all experts' tensors of one layer."""
        return self._map.expert_tensor_names(layer)

    def _read(self, layer: int, parameter: str, expert: int) -> torch.Tensor:
        pieces, is_stacked = self._map.expert_pieces(layer, parameter, expert)
        row = expert if is_stacked else None
        tensors = [self._checkpoint.read(piece.name, row=row) for piece in pieces]
        return self._converted(layer, parameter, pieces, tensors, is_stacked)

    def _converted(
        self,
        layer: int,
        parameter: str,
        pieces: Sequence[Piece],
        tensors: Sequence[torch.Tensor],
        is_stacked: bool,
    ) -> torch.Tensor:
        if is_stacked and pieces[0].pattern is not None:
            tensors = [tensor.unsqueeze(0) for tensor in tensors]
        made = self._map.convert_expert(layer, parameter, pieces, tensors)
        if self._transposed[layer] and made.ndim == 2:
            made = made.T
        return made.to(self._dtype).contiguous()


def expert_dtype(tensor_map: TensorMap, checkpoint: Checkpoint) -> FloatName:
    """Return the dtype that holds every expert as stored: float32 if they have several.

    Raises:
        CorruptArtifactError: the checkpoint holds no experts.
        UnsupportedModelError: the experts are not stored as floats.
    """
    found = set()
    for layer in tensor_map.moe_layers:
        for name in tensor_map.expert_tensor_names(layer):
            info = checkpoint.tensors[name]
            require_float(info)
            found.add(info.dtype)
    if not found:
        raise CorruptArtifactError(
            "the checkpoint holds no experts", hint="download the checkpoint again"
        )
    if not found <= _FLOAT_NAMES.keys():
        raise UnsupportedModelError(
            f"experts stored as {', '.join(sorted(found))} are not read",
            hint="use a float32, bfloat16 or float16 version of the checkpoint",
        )
    return _FLOAT_NAMES[found.pop()] if len(found) == 1 else "float32"


def is_transposed(modules: MoeLayerModules) -> bool:
    """Return whether this layer's module has its matrices as [in, out]."""
    return bool(modules.experts.is_transposed)
