"""Matrices outside the routed experts that a run holds in the codes of a quantized checkpoint."""

from collections.abc import Collection, Mapping

from moe_tool.formats.safetensors_index import Checkpoint
from moe_tool.models.stored_formats.logical_checkpoint import LogicalCheckpoint
from moe_tool.models.tensor_map import TensorMap
from moe_tool.native.kept import is_computed
from moe_tool.quantization.kept_codes import KeptWeight


def kept_matrices(
    tensor_map: TensorMap,
    checkpoint: Checkpoint,
    shapes: Mapping[str, tuple[int, int]],
    *,
    excluded: Collection[str],
) -> dict[str, int]:
    """Return the matrices that stay in codes, with their bytes in memory; nothing is read.

    A matrix is decoded instead if it is put together from several tensors, if the kernels do not
    know its groups, or if a bundle made of the checkpoint holds floats, so that both compute alike.

    Args:
        tensor_map: checked map of `checkpoint`.
        checkpoint: a whole one, or a bundle's skeleton.
        shapes: matrices of linear modules, with their (out, in).
        excluded: matrices that something else needs as floats.
    """
    if not isinstance(checkpoint, LogicalCheckpoint) or not checkpoint.is_declared:
        return {}
    found = {}
    for name in (tensor_map.skeleton.keys() & shapes.keys()) - set(excluded):
        (first, *others) = tensor_map.skeleton[name]
        if others or first.pattern is not None:
            continue
        weight = checkpoint.outline(first.name)
        if weight is not None and weight.shape == shapes[name] and _is_computed(weight):
            found[name] = weight.size_bytes
    return found


def _is_computed(weight: KeptWeight) -> bool:
    parts = (weight.codes, weight.scale, weight.zero, weight.global_scale)
    are_contiguous = all(part is None or part.is_contiguous() for part in parts)
    return are_contiguous and is_computed(weight.group[1], weight.shape[1])
