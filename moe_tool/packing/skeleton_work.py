"""Writer of a skeleton: matrices quantized if wanted, the rest byte for byte as on disk."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from moe_tool.artifacts.bundle_manifest import SkeletonLinear
from moe_tool.artifacts.bundle_sections import Section
from moe_tool.artifacts.precision import IntegerPrecision, NativePrecision
from moe_tool.artifacts.row_tables import RowTablePart, RowTables, block_bytes_of
from moe_tool.budget.table_choice import AUTO_ROWS, RowsRequest
from moe_tool.formats.block_hashes import BlockHasher
from moe_tool.formats.bundle_files import SkeletonEntry
from moe_tool.formats.bundle_writer import BundleWriter
from moe_tool.formats.integer_parts import IntegerPart, integer_parts
from moe_tool.formats.safetensors_index import Checkpoint
from moe_tool.formats.tensor_stream import stream_tensor
from moe_tool.models.architecture import OpenedModel
from moe_tool.models.skeleton_loader import SkeletonLoader
from moe_tool.models.skeleton_source import LinearGroup
from moe_tool.progress import Progress
from moe_tool.quantization.bit_packing import ROWS
from moe_tool.quantization.round_to_nearest import quantize
from moe_tool.quantization.weights import IntegerWeight

_BLOCK_WEIGHTS = 2**22
"""Weights expanded to float32 at once: the head of a large vocabulary would be gigabytes"""


class SkeletonWork:
    """The skeleton of one model as it will be written, with its size."""

    def __init__(
        self,
        opened: OpenedModel,
        precision: NativePrecision | IntegerPrecision,
        *,
        loader: SkeletonLoader,
        rows: RowsRequest = AUTO_ROWS,
    ) -> None:
        """Lay out the tensors; nothing is read.

        Args:
            opened: the model; its checkpoint stays open and owned by the caller.
            loader: tells the embedding tables of the checkpoint.
            rows: tables that a run leaves on disk by default; "none": their blocks are not hashed.
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
        coded = {linear.parameter for linear in self._linears}
        self._rows = rows
        self._tables = {} if rows.kind == "none" else loader.tables_beside(coded)
        self._streamed = {i.name: i for table in self._tables.values() for i in table.parts}
        """Tensor with rows of a table -> its place; it may be larger than memory"""
        self._hashers: dict[str, BlockHasher] = {}
        """Tensor with rows of a table -> hashes of its blocks"""
        self._made: tuple[LinearGroup | None, dict[str, IntegerWeight]] = (None, {})
        """Codes of the current group"""

    def write(
        self, writer: BundleWriter, progress: Progress, *, written: Checkpoint | None = None
    ) -> None:
        """Write the skeleton, one group of tensors in memory at a time; tables pass in pieces.

        Args:
            written: the same skeleton as another run wrote it; None: it is made.

        Raises:
            CorruptArtifactError: a tensor holds NaN or infinity.
            StorageError: the checkpoint cannot be read, or the disk refuses.
        """
        progress.begin("pack the skeleton", self.size_bytes, "bytes")

        self._hashers = {
            name: BlockHasher(block_bytes_of(info.size_bytes))
            for name, info in self._streamed.items()
        }

        def read(name: str) -> Iterator[bytes | memoryview]:
            pieces = self._read(name) if written is None else stream_tensor(written.tensors[name])
            if name in self._hashers:
                pieces = self._hashers[name].passed(pieces)
            for piece in pieces:
                yield piece
                progress.advance(len(piece))

        writer.write_skeleton(
            self._entries, read, precision=self._precision, linears=tuple(self._linears)
        )
        self._made = (None, {})
        progress.end()

    def section(self) -> Section:
        """Return the section on the tables, once the skeleton is written."""
        parts = [
            RowTablePart(
                tensor=info.name,
                parameter=parameter,
                held_bytes=table.held_bytes * info.shape[0] // sum(i.shape[0] for i in table.parts),
                block_bytes=block_bytes_of(info.size_bytes),
                xxh3=self._hashers[info.name].result(),
            )
            for parameter, table in self._tables.items()
            for info in table.parts
            if info.size_bytes
        ]
        body = RowTables(rows=self._rows.word, parts=tuple(parts))
        return Section(required=False, body=body.model_dump(mode="json"))

    def _plan_group(self, group: LinearGroup, precision: IntegerPrecision) -> None:
        for parameter in group.made_as:
            n_outputs, n_inputs = self._opened.skeleton.shapes[parameter]
            self._linears.append(
                SkeletonLinear(parameter=parameter, n_outputs=n_outputs, n_inputs=n_inputs)
            )
            for part in integer_parts(parameter, n_outputs, n_inputs, precision):
                self._parts[part.name] = (group, part)

    def _read(self, name: str) -> Iterable[bytes | memoryview]:
        if name in self._streamed:
            finite = self._opened.checkpoint.requires_finite
            return stream_tensor(self._streamed[name], requires_finite=finite)
        if name not in self._parts:
            return (self._opened.checkpoint.read_copied(name),)
        group, _ = self._parts[name]
        if self._made[0] is not group:
            self._made = (None, {})  # free one group before the next is made
            assert self._precision.kind == "integer"
            weights = self._opened.skeleton.read(group)
            self._made = (group, {name: _quantize(w, self._precision) for name, w in weights})
        parameter, _, part = name.rpartition(".")
        return (memoryview(self._made[1][parameter].part(part).numpy().data).cast("B"),)


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
