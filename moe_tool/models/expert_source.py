"""Reader of single experts of a checkpoint in canonical form, whatever the layout on disk."""

import torch
from transformers import PreTrainedModel

from moe_tool.artifacts.moe_shape import FloatName
from moe_tool.errors import CorruptArtifactError, UnsupportedModelError
from moe_tool.formats.safetensors_index import Checkpoint
from moe_tool.models.moe_layers import MoeLayerModules, expert_parameters
from moe_tool.models.tensor_map import TensorMap
from moe_tool.models.unused_tensors import require_float

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

    def tensor_names(self, layer: int) -> list[str]:
        """Return the on-disk names, sorted, of all experts' tensors of one layer."""
        return self._map.expert_tensor_names(layer)

    def _read(self, layer: int, parameter: str, expert: int) -> torch.Tensor:
        pieces, is_stacked = self._map.expert_pieces(layer, parameter, expert)
        tensors = []
        for piece in pieces:
            if is_stacked:
                row = self._checkpoint.read(piece.name, row=expert)
                tensors.append(row if piece.pattern is None else row.unsqueeze(0))
            else:
                tensors.append(self._checkpoint.read(piece.name))
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
