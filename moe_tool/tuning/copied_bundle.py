"""A bundle written anew from another one: all as it is there but some experts' codes."""

from collections.abc import Mapping
from pathlib import Path

import torch

from moe_tool.artifacts.bundle_manifest import BundleManifest, TunedWeights
from moe_tool.artifacts.expert_ids import ExpertKey
from moe_tool.artifacts.precision import IntegerPrecision
from moe_tool.artifacts.routing import PRIMARY
from moe_tool.formats.bundle_files import SkeletonEntry
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.formats.bundle_writer import BundleWriter
from moe_tool.formats.expert_form import ExpertForm
from moe_tool.progress import Progress
from moe_tool.quantization.weights import ExpertWeights, FloatWeight, IntegerWeight


class CopiedBundle:
    """The old bundle and the one under way. `writer` is to be suspended by who made this."""

    def __init__(self, old: BundleReader, out: Path, step: TunedWeights) -> None:
        """Begin the new bundle, or go on with it.

        Args:
            old: stays open and owned by the caller.
            out: the new bundle's folder.
            step: what is done to the codes: another one in `out` is refused.

        Raises:
            UsageError, WrongModelError, CorruptArtifactError, StorageError: as `BundleWriter.open`.
        """
        manifest = old.manifest
        self._old = old
        self._step = step
        self._level: dict[ExpertKey, int] = {
            (record.layer, record.expert): level
            for level in old.own_levels
            for record in old.levels[level].records
        }
        self.writer = BundleWriter.open(
            out,
            identity=manifest.identity,
            shape=manifest.shape,
            precision=manifest.precision,
            order=sorted([*self._level, *manifest.absent], key=lambda key: key[0]),
            replicas=[table.precision for table in manifest.replicas],
            replicas_of=[_keys(old, 1 + at) for at in range(len(manifest.replicas))] or None,
            others=[
                (own.precision, _keys(old, 1 + len(manifest.replicas) + at))
                for at, own in enumerate(manifest.others)
            ],
            absent=manifest.absent,
            made_from=manifest.made_from
            | {f"tune.{key}": _said(value) for key, value in step.model_dump().items()},
        )

    @property
    def missing_bytes(self) -> int:
        """Of what is still to be written, about."""
        records = [self.form(level).layout.size_bytes for level, _, _ in self.writer.to_write]
        experts = {record.file for record in self._old.manifest.own_records}
        experts |= {r.file for table in self._old.manifest.replicas for r in table.records}
        others = [f.size_bytes for f in self._old.manifest.files if f.name not in experts]
        return sum(records) + sum(others)

    @property
    def own_levels(self) -> tuple[int, ...]:
        """Of the experts themselves; the others are cheaper forms."""
        return self._old.own_levels

    def own_experts(self, layer: int) -> list[int]:
        """Return the experts of a layer that are not absent, ascending."""
        return sorted(expert for found, expert in self._level if found == layer)

    def has_codes(self, layer: int, expert: int) -> bool:
        """Return whether an expert's own form is one of codes."""
        return isinstance(self.form(self.level(layer, expert)).precision, IntegerPrecision)

    def level(self, layer: int, expert: int) -> int:
        """Return the level of an expert's own form."""
        return self._level[layer, expert]

    def form(self, level: int) -> ExpertForm:
        """Return how the records of a level are written."""
        form = self._old.levels[level].form
        assert isinstance(form, ExpertForm), "experts in channels are not copied"
        return form

    def old_record(self, level: int, layer: int, expert: int) -> torch.Tensor:
        """Read a record of the old bundle; see `BundleReader.read_record_into`."""
        record = torch.empty(self._old.levels[level].record_size_bytes, dtype=torch.uint8)
        self._old.read_record_into(layer, expert, record, level=level)
        return record

    def new_record(
        self, layer: int, expert: int, weights: Mapping[str, FloatWeight | IntegerWeight]
    ) -> torch.Tensor:
        """Return an expert's own record with other codes."""
        codes = {n: w for n, w in weights.items() if isinstance(w, IntegerWeight)}
        floats = {n: w.values for n, w in weights.items() if isinstance(w, FloatWeight)}
        form = self.form(self.level(layer, expert))
        return form.encode(floats, quantize_expert=lambda *_: codes)

    def decode(self, layer: int, expert: int, record: torch.Tensor) -> ExpertWeights:
        """Return an expert over its own record; views."""
        return self.form(self.level(layer, expert)).decode(record)

    def old_expert(self, layer: int, expert: int) -> ExpertWeights:
        """Read an expert of the old bundle, in its own form."""
        record = self.old_record(self.level(layer, expert), layer, expert)
        return self.decode(layer, expert, record)

    def written_expert(self, layer: int, expert: int) -> ExpertWeights:
        """Read an expert of the new bundle, in its own form."""
        record = self.writer.read_back(self.level(layer, expert), layer, expert)
        return self.decode(layer, expert, record)

    def copy_replica(self, level: int, layer: int, expert: int) -> None:
        """Write a cheaper form as it was, with the price that it had."""
        prices = self._old.manifest.replicas[level - PRIMARY - 1].prices
        eps = next(entry.eps[expert] for entry in prices if entry.layer == layer)
        record = self.old_record(level, layer, expert)
        self.writer.write_record(level, layer, expert, record, eps=eps)

    def finish(self, progress: Progress) -> BundleManifest:
        """Copy all that is no expert, write the manifest and give the bundle its name.

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
            profile_sha256=old.profile_sha256,
        )

    def _copy_skeleton(self, progress: Progress) -> None:
        with self._old.open_skeleton() as skeleton:
            # Each name in the order of the old files, which need not be that of the alphabet.
            entries = [
                SkeletonEntry(
                    name=each.name,
                    dtype=skeleton.tensors[each.name].dtype,
                    shape=skeleton.tensors[each.name].shape,
                    size_bytes=skeleton.tensors[each.name].size_bytes,
                )
                for each in self._old.manifest.skeleton
            ]
            progress.begin("copy the skeleton", sum(e.size_bytes for e in entries), "bytes")

            def read(name: str) -> bytes | memoryview:
                data = skeleton.read_bytes(name)
                progress.advance(len(data))
                return data

            self.writer.write_skeleton(
                entries,
                read,
                precision=self._old.manifest.skeleton_precision,
                linears=self._old.manifest.skeleton_linears,
            )
            progress.end()


def _keys(old: BundleReader, level: int) -> list[ExpertKey]:
    return [(record.layer, record.expert) for record in old.levels[level].records]


def _said(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
