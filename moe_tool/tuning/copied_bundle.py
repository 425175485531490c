"""Copy of a bundle with new codes for some experts, and new floats beside them."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

from moe_tool.artifacts.bundle_manifest import BundleManifest, TunedWeights
from moe_tool.artifacts.bundle_sections import (
    RESIDENT_USE,
    ROUTING_NORM,
    ROW_TABLES,
    TUNED_FLOATS,
    Section,
    TunedFloats,
)
from moe_tool.formats.atomic_write import storage_errors
from moe_tool.formats.bundle_checks import BundleForm, skeleton_parts
from moe_tool.formats.bundle_files import SkeletonEntry, partial_folder
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.formats.bundle_spec import BundleSpec, FormPlan
from moe_tool.formats.bundle_writer import BundleWriter
from moe_tool.progress import Progress
from moe_tool.quantization.weights import ExpertWeights

_STATE = ".floats-training.safetensors"
"""File of a training of norms and routers under way"""


class CopiedBundle:
    """Old bundle and the new one being written. The creator has to suspend `writer`."""

    def __init__(
        self,
        old: BundleReader,
        out: Path,
        step: TunedWeights,
        *,
        beside: Mapping[str, object] = MappingProxyType({}),
    ) -> None:
        """Begin or resume the new bundle.

        Args:
            old: stays open and owned by the caller.
            step: change of the codes; a folder with another one is refused.
            beside: options of what is trained beside the codes; likewise.

        Raises:
            UsageError, WrongModelError, CorruptArtifactError, StorageError: as `BundleWriter.open`.
        """
        manifest = old.manifest
        self._old = old
        self._out = out
        self._step = step
        self._floats: dict[str, torch.Tensor] = {}
        """Float weights that replace the skeleton's, float32 by tensor name"""
        # The skeleton is copied but for norms and routers, so its tables have the same blocks.
        self._sections = {
            name: manifest.sections[name]
            for name in (RESIDENT_USE, ROUTING_NORM, ROW_TABLES)
            if name in manifest.sections
        }
        order = [(record.layer, record.expert) for record in manifest.primary_records]
        self.writer = BundleWriter.open(
            out,
            BundleSpec(
                identity=manifest.identity,
                shape=manifest.shape,
                order=tuple(sorted([*order, *manifest.removed], key=lambda key: key[0])),
                forms=tuple(
                    FormPlan(role=t.role, precision=t.precision, experts=t.experts)
                    for t in manifest.forms
                ),
                removed=frozenset(manifest.removed),
                made_from=manifest.made_from
                | {
                    f"tune.{key}": _said(value)
                    for key, value in (step.model_dump() | dict(beside)).items()
                },
            ),
        )

    @property
    def missing_bytes(self) -> int:
        """Approximate size of the missing records"""
        sizes = [self._old.forms[form].record_size_bytes for form, _, _ in self.writer.to_write]
        experts = {record.file for table in self._old.manifest.forms for record in table.records}
        others = [f.size_bytes for f in self._old.manifest.files if f.name not in experts]
        return sum(sizes) + sum(others)

    def experts(self, layer: int) -> list[int]:
        """Return the experts of a layer that are not removed, ascending."""
        return np.flatnonzero(self._old.manifest.stored(layer)).tolist()

    def primary(self, layer: int, expert: int) -> BundleForm:
        """Return the primary form of an expert."""
        return self._old.primary_form(layer, expert)

    def old_record(self, form: int, layer: int, expert: int) -> torch.Tensor:
        """Read a record of the old bundle; see `BundleReader.read_record_into`."""
        record = torch.empty(self._old.forms[form].record_size_bytes, dtype=torch.uint8)
        self._old.read_record_into(layer, expert, record, form=form)
        return record

    def decode(self, layer: int, expert: int, record: torch.Tensor) -> ExpertWeights:
        """Return an expert as views into its primary record."""
        weights: ExpertWeights = self.primary(layer, expert).form.decode(record)
        return weights

    def old_expert(self, layer: int, expert: int) -> ExpertWeights:
        """Read an expert's primary form from the old bundle."""
        record = self.old_record(self.primary(layer, expert).index, layer, expert)
        return self.decode(layer, expert, record)

    def written_expert(self, layer: int, expert: int) -> ExpertWeights:
        """Read an expert's primary form from the new bundle."""
        record = self.writer.read_back(self.primary(layer, expert).index, layer, expert)
        return self.decode(layer, expert, record)

    def copy_replica(self, form: int, layer: int, expert: int) -> None:
        """Copy a cheaper form with its price."""
        record = self.old_record(form, layer, expert)
        eps = self._old.record_entry(layer, expert, form=form).eps
        self.writer.write_record(form, layer, expert, record, eps=eps)

    @property
    def training_state(self) -> Path:
        """File of an interrupted training of norms and routers."""
        return partial_folder(self._out) / _STATE

    def keep_floats(self, values: Mapping[str, torch.Tensor], verdict: TunedFloats) -> None:
        """Replace tensors of the skeleton, float32 by name, and say what they are worth."""
        self._floats = dict(values)
        self._sections[TUNED_FLOATS] = Section(required=False, body=verdict.model_dump(mode="json"))

    def finish(self, progress: Progress) -> BundleManifest:
        """Copy everything but the experts, write the manifest and give the bundle its name.

        Raises:
            CorruptArtifactError: the old bundle is damaged.
            StorageError: the disk refuses.
        """
        old = self._old.manifest
        if not self.writer.finished:
            self._copy_skeleton(progress)
            for file in old.files:
                if not file.name.endswith(".safetensors"):
                    self.writer.add_file(file.name, (self._old.folder / file.name).read_bytes())
        manifest = self.writer.finish(
            heat=old.heat,
            buddies=old.buddies,
            prices=old.prices,
            plan=old.plan,
            lineage=(*old.lineage, self._step),
            sections=self._sections,
            profile_sha256=old.profile_sha256,
        )
        with storage_errors(self._out):
            (self._out / _STATE).unlink(missing_ok=True)
        return manifest

    def _copy_skeleton(self, progress: Progress) -> None:
        with self._old.open_skeleton() as skeleton:
            # Names keep the order of the old files, which need not be alphabetical.
            entries = [
                self._float_entry(each.name)
                if each.name in self._floats
                else SkeletonEntry(
                    name=each.name,
                    dtype=skeleton.tensors[each.name].dtype,
                    shape=skeleton.tensors[each.name].shape,
                    size_bytes=skeleton.tensors[each.name].size_bytes,
                )
                for each in self._old.manifest.skeleton
            ]
            codes = {part.name for part in skeleton_parts(self._old.manifest)}
            progress.begin("copy the skeleton", sum(e.size_bytes for e in entries), "bytes")

            def pieces(name: str) -> Iterable[bytes | memoryview]:
                if name in self._floats:
                    return (self._floats[name].contiguous().numpy().tobytes(),)
                # A table may be larger than memory. Parts of codes are small, and looked at too.
                if name in codes:
                    return (skeleton.read_bytes(name),)
                return self._old.tables.stream(name)

            def read(name: str) -> Iterator[bytes | memoryview]:
                for piece in pieces(name):
                    progress.advance(len(piece))
                    yield piece

            self.writer.write_skeleton(
                entries,
                read,
                precision=self._old.manifest.skeleton_precision,
                linears=self._old.manifest.skeleton_linears,
            )
            progress.end()

    def _float_entry(self, name: str) -> SkeletonEntry:
        """Describe a trained tensor, float32 whatever it was: bfloat16 would lose its steps."""
        value = self._floats[name]
        return SkeletonEntry(
            name=name, dtype="F32", shape=tuple(value.shape), size_bytes=value.nbytes
        )


def _said(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
