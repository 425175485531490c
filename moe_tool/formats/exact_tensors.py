"""Reader of a safetensors file that holds the expected tensors and nothing else."""

from collections.abc import Mapping
from pathlib import Path

import torch

from moe_tool.errors import CorruptArtifactError
from moe_tool.formats.finite_numbers import are_finite
from moe_tool.formats.hostile_file import quoted
from moe_tool.formats.safetensors_index import Checkpoint, read_header


def read_exactly(
    path: Path, wanted: Mapping[str, tuple[str, tuple[int, ...]]], *, remedy: str
) -> dict[str, torch.Tensor]:
    """Return the tensors of a file that holds these and no others, without NaN or infinity.

    Args:
        wanted: dtype and shape by name.

    Raises:
        CorruptArtifactError: it is damaged, or a tensor is missing, unknown, of another dtype or
            shape, or not finite.
        NotFoundError, StorageError: it cannot be read.
    """
    infos = read_header(path)
    if infos.keys() != wanted.keys():
        odd = min(infos.keys() ^ wanted.keys())
        verb = "lacks" if odd in wanted else "holds the unknown"
        raise CorruptArtifactError(f"{path} {verb} {quoted(odd)}", hint=remedy)
    for name, info in infos.items():
        dtype, shape = wanted[name]
        if (info.dtype, info.shape) != (dtype, shape):
            raise CorruptArtifactError(
                f"{path}: {quoted(name)} is {info.dtype} {list(info.shape)}, "
                f"wanted {dtype} {list(shape)}",
                hint=remedy,
            )
    with Checkpoint(infos) as checkpoint:
        values = {name: checkpoint.read(name) for name in wanted}
    for name, value in values.items():
        if not are_finite(value):
            raise CorruptArtifactError(f"{path}: {quoted(name)} holds NaN or infinity", hint=remedy)
    return values
