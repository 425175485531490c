"""State of an interrupted training in a safetensors file, from which the same command resumes."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_tool.errors import CorruptArtifactError
from moe_tool.formats.atomic_write import atomic_write_bytes
from moe_tool.formats.bundle_files import safetensors_file
from moe_tool.formats.exact_tensors import read_exactly
from moe_tool.formats.safetensors_index import Checkpoint, read_header

_ORDER, _COUNTERS = "order", "counters"
_ORDER_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """Progress of a training."""

    step: int
    """Steps done"""
    tensors: dict[str, torch.Tensor]
    """Parameters and optimizer moments by name, float32"""
    penalty: float = 1.0
    """Penalty of a training that has one"""


def order_digest(order: Mapping[str, Any]) -> bytes:
    """Return a digest of all settings that decide the outcome of a training."""
    return hashlib.sha256(json.dumps(order, sort_keys=True).encode()).digest()


def write_training_state(path: Path, order: bytes, state: TrainingState) -> None:
    """Write the state atomically.

    Raises:
        DiskFullError, StorageError: the file cannot be written.
    """
    tensors = {
        _ORDER: torch.frombuffer(bytearray(order), dtype=torch.uint8),
        _COUNTERS: torch.tensor([float(state.step), state.penalty], dtype=torch.float64),
        **state.tensors,
    }
    atomic_write_bytes(path, safetensors_file(tensors))


def read_training_state(
    path: Path, order: bytes, wanted: Mapping[str, torch.Tensor], *, n_steps: int
) -> TrainingState | None:
    """Return the state; None if there is none, or it belongs to another training.

    Args:
        wanted: tensors of the expected names and shapes.

    Raises:
        CorruptArtifactError: the file is damaged.
        StorageError: it cannot be read.
    """
    if not path.exists():
        return None
    again = f"remove {path} and start the training again"
    infos = read_header(path)
    expected = {name: ("F32", tuple(each.shape)) for name, each in wanted.items()}
    expected |= {_ORDER: ("U8", (_ORDER_BYTES,)), _COUNTERS: ("F64", (2,))}
    found = infos.get(_ORDER)
    if found is not None and (found.dtype, found.shape) == expected[_ORDER]:
        with Checkpoint(infos) as checkpoint:
            if checkpoint.read_bytes(_ORDER) != order:
                return None
    tensors = read_exactly(path, expected, remedy=again)
    step, penalty = tensors.pop(_COUNTERS).tolist()
    del tensors[_ORDER]
    if step != int(step) or not 1 <= step <= n_steps or penalty <= 0:
        raise CorruptArtifactError(f"{path} is damaged: its counters cannot be", hint=again)
    return TrainingState(step=int(step), penalty=penalty, tensors=tensors)
