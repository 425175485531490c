"""Search for records in a checkpoint's own files, for `pack --in-place`."""

import hashlib
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from moe_tool.artifacts.source_files import (
    MAX_SPREAD_BYTES,
    PLACED_KINDS,
    WIDENED,
    Part,
    SourceFile,
)
from moe_tool.errors import UnsupportedModelError, UsageError
from moe_tool.formats.bundle_spec import FormPlan
from moe_tool.formats.hostile_file import reading
from moe_tool.formats.record_form import RecordForm, record_form
from moe_tool.formats.record_layout import Segment
from moe_tool.formats.record_sources import RecordSources, source_path
from moe_tool.formats.safetensors_index import TensorInfo
from moe_tool.models.architecture import OpenedModel
from moe_tool.packing.expert_coding import coded


class InPlace:
    """Files of a checkpoint whose bytes records are compared with."""

    def __init__(self, folder: Path, opened: OpenedModel) -> None:
        """Open the files that hold experts.

        Raises:
            CorruptArtifactError: a file lies outside the folder; see `source_path`.
            StorageError: it cannot be read.
        """
        self._experts = opened.experts
        shape = opened.shape
        infos = [
            info
            for layer in shape.layers
            for expert in range(shape.experts)
            for tensor in shape.expert_tensors
            for places in opened.experts.places(layer, tensor.name, expert).values()
            for info in places
        ]
        names = sorted({info.file.name for info in infos})
        self._numbers = {name: number for number, name in enumerate(names)}
        firsts: dict[str, int] = {}
        for info in opened.checkpoint.raw.tensors.values():
            firsts[info.file.name] = min(info.offset, firsts.get(info.file.name, info.offset))
        files = [_source_file(folder, name, firsts[name]) for name in names]
        self.sources = RecordSources(folder, files)

    def find(
        self, form: RecordForm[Any], layer: int, expert: int, record: torch.Tensor
    ) -> tuple[Part, ...]:
        """Return the parts that make a record.

        Raises:
            UnsupportedModelError: a tensor of it lies in another layout; names it.
            StorageError: the checkpoint cannot be read.
        """
        found: list[Part] = []
        for segment in form.layout.segments:
            parameter, _, _ = segment.name.partition(".")
            by_role = self._experts.places(layer, parameter, expert)
            wanted = record[segment.offset : segment.offset + segment.n_bytes]
            options = (self._parts(places, segment) for places in by_role.values())
            parts = next((p for p in options if p and self._is_right(p, segment, wanted)), None)
            if parts is None:
                first = next(iter(by_role.values()))[0].name
                raise UnsupportedModelError(
                    f"--in-place: layer {layer} expert {expert} needs {segment.name} in another "
                    f"order or dtype than the checkpoint's {first} lies in its file",
                    hint="pack without --in-place",
                )
            found += parts
        return tuple(found)

    def _parts(self, places: Sequence[TensorInfo], segment: Segment) -> list[Part]:
        """Return parts that fill a segment; none if they do not."""
        total = sum(info.size_bytes for info in places)
        times, rest = divmod(segment.n_bytes, max(total, 1))
        is_bfloat16 = all(info.dtype == "BF16" for info in places)
        if rest or times < 1:
            return []
        if times == 2 and segment.dtype == "float32" and is_bfloat16:
            times = WIDENED
        if times != 1 and max(info.size_bytes for info in places) > MAX_SPREAD_BYTES:
            return []
        return [
            Part(
                file=self._numbers[info.file.name],
                offset=info.offset,
                size_bytes=info.size_bytes,
                times=times,
            )
            for info in places
        ]

    def _is_right(self, parts: Sequence[Part], segment: Segment, wanted: torch.Tensor) -> bool:
        with reading(self.sources.folder):
            return torch.equal(self.sources.read_segment(parts, segment), wanted)


def placed_forms(forms: Sequence[FormPlan]) -> frozenset[int]:
    """Return the positions of the tables whose records a checkpoint can hold."""
    return frozenset(at for at, form in enumerate(forms) if form.precision.kind in PLACED_KINDS)


def require_in_place(opened: OpenedModel, folder: Path, forms: Sequence[FormPlan]) -> None:
    """Refuse --in-place, before anything is written, if the first expert cannot stay in place.

    Raises:
        UsageError: nothing would stay.
        UnsupportedModelError: the checkpoint has another layout.
        CorruptArtifactError, StorageError: as `InPlace`.
    """
    at = next(iter(placed_forms(forms)), None)
    if at is None:
        raise UsageError(
            "--in-place: all experts get new codes, which the checkpoint does not hold",
            hint="pack without --in-place, or with --bits native",
        )
    layer, expert = min(forms[at].experts)
    precision = forms[at].precision
    form = record_form(opened.shape, precision)
    kept = opened.experts.read_kept(layer, expert) if precision.kind == "kept" else None
    weights = kept or coded(opened.experts.read(layer, expert), precision)
    in_place = InPlace(folder, opened)
    with closing(in_place.sources):
        in_place.find(form, layer, expert, form.encode(weights))


def _source_file(folder: Path, name: str, header_bytes: int) -> SourceFile:
    path = source_path(folder, name)
    with reading(path), open(path, "rb") as file:
        header = file.read(header_bytes)
    return SourceFile(
        name=name,
        size_bytes=path.stat().st_size,
        header_bytes=header_bytes,
        header_sha256=hashlib.sha256(header).hexdigest(),
    )
