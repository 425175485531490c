"""Writer of a skeleton: matrices quantized if wanted, the rest byte for byte as on disk."""

from dataclasses import replace

import torch

from moe_tool.artifacts.bundle_manifest import SkeletonLinear
from moe_tool.artifacts.precision import IntegerPrecision, NativePrecision
from moe_tool.formats.bundle_files import SkeletonEntry
from moe_tool.formats.bundle_writer import BundleWriter
from moe_tool.formats.integer_parts import IntegerPart, integer_parts
from moe_tool.formats.safetensors_index import Checkpoint
from moe_tool.models.architecture import OpenedModel
from moe_tool.models.skeleton_source import LinearGroup
from moe_tool.progress import Progress
from moe_tool.quantization.bit_packing import ROWS
from moe_tool.quantization.round_to_nearest import quantize
from moe_tool.quantization.weights import IntegerWeight

_BLOCK_WEIGHTS = 2**22
"""Weights expanded to float32 at once: the head of a large vocabulary would be gigabytes"""


class SkeletonWork:
    """The skeleton of one model as it will be written, with its size."""

    def __init__(self, opened: OpenedModel, precision: NativePrecision | IntegerPrecision) -> None:
        """Lay out the tensors; nothing is read.

        Args:
            opened: the model; its checkpoint stays open and owned by the caller.
        """
        self._opened = opened
        self._precision = precision
        self._parts: dict[str, tuple[LinearGroup, IntegerPart]] = {}
        """Stored tensor -> group and part that it comes from"""
        self._linears: list[SkeletonLinear] = []
        source = opened.skeleton
        names = source.tensor_names
        if precision.kind == "integer":
            names = source.other_names
            for group in source.groups:
                self._plan_group(group, precision)
        infos = {info.name: info for name in names for info in opened.checkpoint.copied(name)}
        self._entries = [
            SkeletonEntry(name=i.name, dtype=i.dtype, shape=i.shape, size_bytes=i.size_bytes)
            for i in infos.values()
        ]
        self._entries += [
            SkeletonEntry(
                name=part.name,
                dtype=part.safetensors_dtype,
                shape=part.shape,
                size_bytes=part.size_bytes,
            )
            for _, part in self._parts.values()
        ]
        self.size_bytes = sum(entry.size_bytes for entry in self._entries)
        self._made: tuple[LinearGroup | None, dict[str, IntegerWeight]] = (None, {})
        """Codes of the current group"""

    def write(
        self, writer: BundleWriter, progress: Progress, *, written: Checkpoint | None = None
    ) -> None:
        """Write the skeleton, one group of tensors in memory at a time.

        Args:
            written: the same skeleton as another run wrote it; None: it is made.

        Raises:
            CorruptArtifactError: a tensor holds NaN or infinity.
            StorageError: the checkpoint cannot be read, or the disk refuses.
        """
        progress.begin("pack the skeleton", self.size_bytes, "bytes")

        def read(name: str) -> bytes | memoryview:
            data = self._read(name) if written is None else written.read_bytes(name)
            progress.advance(len(data))
            return data

        writer.write_skeleton(
            self._entries, read, precision=self._precision, linears=tuple(self._linears)
        )
        self._made = (None, {})
        progress.end()

    def _plan_group(self, group: LinearGroup, precision: IntegerPrecision) -> None:
        for parameter in group.made_as:
            n_outputs, n_inputs = self._opened.skeleton.shapes[parameter]
            self._linears.append(
                SkeletonLinear(parameter=parameter, n_outputs=n_outputs, n_inputs=n_inputs)
            )
            for part in integer_parts(parameter, n_outputs, n_inputs, precision):
                self._parts[part.name] = (group, part)

    def _read(self, name: str) -> bytes | memoryview:
        if name not in self._parts:
            return self._opened.checkpoint.read_copied(name)
        group, _ = self._parts[name]
        if self._made[0] is not group:
            self._made = (None, {})  # free one group before the next is made
            assert self._precision.kind == "integer"
            weights = self._opened.skeleton.read(group)
            self._made = (group, {name: _quantize(w, self._precision) for name, w in weights})
        parameter, _, part = name.rpartition(".")
        return memoryview(self._made[1][parameter].part(part).numpy().data).cast("B")


def _quantize(weight: torch.Tensor, precision: IntegerPrecision) -> IntegerWeight:
    """Quantize a matrix in blocks of rows, which are independent."""
    n_rows = max(1, _BLOCK_WEIGHTS // weight.shape[1] // ROWS) * ROWS
    blocks = [
        quantize(rows, precision.width_bits, group=precision.group)
        for rows in torch.split(weight, n_rows)
    ]
    return replace(
        blocks[0],
        planes=tuple(torch.cat(planes) for planes in zip(*(b.planes for b in blocks), strict=True)),
        scales=torch.cat([block.scales for block in blocks]),
        n_outputs=len(weight),
    )
