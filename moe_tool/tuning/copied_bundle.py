"""Copy of a bundle with new codes for some experts."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from moe_tool.artifacts.bundle_manifest import BundleManifest, TunedWeights
from moe_tool.artifacts.bundle_sections import ROW_TABLES
from moe_tool.formats.bundle_checks import BundleForm, skeleton_parts
from moe_tool.formats.bundle_files import SkeletonEntry
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.formats.bundle_spec import BundleSpec, FormPlan
from moe_tool.formats.bundle_writer import BundleWriter
from moe_tool.progress import Progress
from moe_tool.quantization.weights import ExpertWeights


class CopiedBundle:
    """Old bundle and the new one being written. The creator has to suspend `writer`."""

    def __init__(self, old: BundleReader, out: Path, step: TunedWeights) -> None:
        """Begin or resume the new bundle.

        Args:
            old: stays open and owned by the caller.
            step: change of the codes; a folder with another one is refused.

        Raises:
            UsageError, WrongModelError, CorruptArtifactError, StorageError: as `BundleWriter.open`.
        """
        manifest = old.manifest
        self._old = old
        self._step = step
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
                | {f"tune.{key}": _said(value) for key, value in step.model_dump().items()},
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
        return self.writer.finish(
            heat=old.heat,
            buddies=old.buddies,
            prices=old.prices,
            plan=old.plan,
            lineage=(*old.lineage, self._step),
            # The skeleton is copied, so its tables have the same blocks.
            sections={n: old.sections[n] for n in (ROW_TABLES,) if n in old.sections},
            profile_sha256=old.profile_sha256,
        )

    def _copy_skeleton(self, progress: Progress) -> None:
        with self._old.open_skeleton() as skeleton:
            # Names keep the order of the old files, which need not be alphabetical.
            entries = [
                SkeletonEntry(
                    name=each.name,
                    dtype=skeleton.tensors[each.name].dtype,
                    shape=skeleton.tensors[each.name].shape,
                    size_bytes=skeleton.tensors[each.name].size_bytes,
                )
                for each in self._old.manifest.skeleton
            ]
            codes = {part.name for part in skeleton_parts(self._old.manifest)}
            progress.begin("copy the skeleton", sum(e.size_bytes for e in entries), "bytes")

            def read(name: str) -> Iterator[bytes | memoryview]:
                # A table may be larger than memory. Parts of codes are small, and looked at too.
                is_code = name in codes
                pieces: Iterable[bytes | memoryview]
                pieces = (skeleton.read_bytes(name),) if is_code else self._old.tables.stream(name)
                for piece in pieces:
                    progress.advance(len(piece))
                    yield piece

            self.writer.write_skeleton(
                entries,
                read,
                precision=self._old.manifest.skeleton_precision,
                linears=self._old.manifest.skeleton_linears,
            )
            progress.end()


def _said(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
