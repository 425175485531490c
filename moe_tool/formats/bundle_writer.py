"""Writer of a bundle that is whole or resumable: records in order, the manifest last.

Everything goes to `<out>.part/`, which becomes `<out>/` by one rename at the very end. The journal
there names records only once their bytes are on the disk; a resume checks them all the same.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import xxhash

from moe_tool import __version__
from moe_tool.artifacts.bundle_manifest import (
    BundleBuddies,
    BundleFile,
    BundleManifest,
    LayerHeat,
    LayerPrices,
    SkeletonLinear,
    SkeletonTensor,
    TunedWeights,
)
from moe_tool.artifacts.bundle_sections import Section
from moe_tool.artifacts.pack_plan import PackPlan
from moe_tool.artifacts.precision import NativePrecision, Precision
from moe_tool.artifacts.source_files import Part, parts_text
from moe_tool.errors import StorageError, UsageError
from moe_tool.formats.atomic_write import storage_errors, sync_folder
from moe_tool.formats.bundle_files import (
    JOURNAL,
    MANIFEST,
    MAX_FILE_BYTES,
    PART_SUFFIX,
    ExpertFile,
    SkeletonEntry,
    is_taken,
    partial_folder,
    require_bundle_name,
    safetensors_header,
    split_skeleton,
)
from moe_tool.formats.bundle_journal import (
    WrittenRecord,
    append_to_journal,
    read_journal,
    write_journal,
)
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.formats.bundle_spec import BundleSpec
from moe_tool.formats.json_artifact import read_json_artifact, write_json_artifact
from moe_tool.formats.placed_file_writer import PlacedFileWriter, source_sections
from moe_tool.formats.record_file_writer import RecordFileWriter
from moe_tool.formats.record_form import RecordForm
from moe_tool.formats.record_plan import plan_records
from moe_tool.formats.record_sources import RecordSources

_SYNC_BYTES = 256 * 2**20


class BundleWriter:
    """One bundle while it is being written."""

    def __init__(self, out: Path, spec: BundleSpec) -> None:
        """Use `open`."""
        self._out = out
        self._folder = partial_folder(out)
        self.spec = spec
        self._plan = plan_records(spec)
        self._records: list[WrittenRecord] = []
        self._unsynced: list[WrittenRecord] = []
        self._unsynced_bytes = 0
        self._expert_files: dict[str, BundleFile] = {}
        self._open_files: dict[str, RecordFileWriter | PlacedFileWriter] = {}
        self._sources: RecordSources | None = None
        self._placed: Mapping[str, int] = {}
        """File that is not written -> form"""
        self._other_files: list[BundleFile] = []
        self._skeleton: list[SkeletonTensor] = []
        self._skeleton_precision: Precision = NativePrecision()
        self._skeleton_linears: tuple[SkeletonLinear, ...] = ()
        self.finished = False

    @classmethod
    def open(
        cls, out: Path, spec: BundleSpec, *, sources: RecordSources | None = None
    ) -> "BundleWriter":
        """Begin a bundle in the folder `out`, resume an interrupted one, or find it finished.

        Args:
            sources: files that hold the records of `spec.placed`; belong to the caller.

        Raises:
            UsageError: `out` holds something else, or was made with other options.
            WrongModelError: it was made from another model.
            CorruptArtifactError: the interrupted or finished bundle is damaged.
            StorageError: the disk refuses.
        """
        writer = cls(out, spec)
        writer._sources = sources
        files = enumerate(writer._plan.files)
        writer._placed = {f.name: at for at, held in files if at in spec.placed for f in held}
        with storage_errors(writer._folder):
            if is_taken(out):
                writer._require_same_finished()
                writer.finished = True
            else:
                writer._begin_or_resume()
        return writer

    @property
    def forms(self) -> tuple[RecordForm[Any], ...]:
        """Forms of the records of each table, in the manifest's order"""
        return self._plan.forms

    @property
    def n_written(self) -> int:
        """Number of records written so far, replicas included."""
        return len(self._plan.order) if self.finished else len(self._records) + len(self._unsynced)

    @property
    def n_durable(self) -> int:
        """Number of records that are on the disk, with their lines in the journal."""
        return len(self._records)

    @property
    def to_write(self) -> Sequence[tuple[int, int, int]]:
        """Missing records in order, (form, layer, expert): all forms of an expert, then the next
        expert."""
        return self._plan.order[self.n_written :]

    def write_record(
        self,
        form: int,
        layer: int,
        expert: int,
        record: torch.Tensor,
        *,
        eps: float | None = None,
        base_eps: float | None = None,
        parts: Sequence[Part] | None = None,
    ) -> None:
        """Append the next record of the order.

        Args:
            form: position of its table.
            record: uint8 [form's layout.size_bytes].
            eps: measured error, see FormRecord; None: not measured.
            base_eps: measured error of the base of a nested expert.
            parts: where the record lies in `sources`, if its form is in `spec.placed`.

        Raises:
            DiskFullError, StorageError: the disk refuses; records written so far can be resumed.
        """
        assert self._plan.order[self.n_written] == (form, layer, expert)
        file, position = self._plan.places[self.n_written]
        data = memoryview(record.numpy().data).cast("B")
        base = data[: self._plan.base_bytes[form]]
        with storage_errors(self._folder / file.name):
            if position == 0:
                self._open(file, anew=True)
            self._open_files[file.name].append(data)
            self._unsynced.append(
                WrittenRecord(
                    layer=layer,
                    expert=expert,
                    file=file.name,
                    offset=file.offset(position),
                    xxh3=xxhash.xxh3_64_hexdigest(data),
                    eps=eps,
                    base_xxh3=xxhash.xxh3_64_hexdigest(base) if base else None,
                    base_eps=base_eps,
                    parts=None if parts is None else parts_text(parts),
                )
            )
            self._unsynced_bytes += len(data)
            if position == len(file.records) - 1:
                self._sync()
                self._end_file(file)
            elif self._unsynced_bytes >= _SYNC_BYTES:
                self._sync()

    def read_back(self, form: int, layer: int, expert: int) -> torch.Tensor:
        """Return a record written by this run or by the one that it resumes.

        Raises:
            StorageError: it cannot be read, or was changed since.
        """
        assert not self.finished
        number = self._plan.order.index((form, layer, expert))
        file, position = self._plan.places[number]
        entry = [*self._records, *self._unsynced][number]
        path = self._folder / file.name
        with storage_errors(path), open(path, "rb") as opened:
            opened.seek(file.offset(position))
            data = bytearray(opened.read(file.record_size_bytes))
        if xxhash.xxh3_64_hexdigest(data) != entry.xxh3:
            raise StorageError(
                f"{path} was changed while it was written: layer {layer} expert {expert}",
                hint="leave the folder alone, and run the same command again",
            )
        return torch.frombuffer(data, dtype=torch.uint8)

    def suspend(self) -> None:
        """Sync the records written so far and leave them for a resume."""
        with storage_errors(self._folder):
            self._sync()
            while self._open_files:
                self._open_files.popitem()[1].close()

    def write_skeleton(
        self,
        tensors: Sequence[SkeletonEntry],
        read: Callable[[str], Iterable[bytes | memoryview]],
        *,
        precision: Precision,
        linears: tuple[SkeletonLinear, ...],
    ) -> None:
        """Write the skeleton.

        Args:
            read: returns the bytes of a tensor by name, in pieces; called in this order.
        """
        self._skeleton_precision, self._skeleton_linears = precision, linears

        def hashed(name: str) -> Iterator[bytes | memoryview]:
            digest = xxhash.xxh3_64()
            for piece in read(name):
                digest.update(piece)
                yield piece
            self._skeleton.append(SkeletonTensor(name=name, xxh3=digest.hexdigest()))

        groups = split_skeleton(tensors, limit_bytes=MAX_FILE_BYTES)
        for number, group in enumerate(groups, start=1):
            header = safetensors_header([(t.name, t.dtype, t.shape, t.size_bytes) for t in group])
            data = chain.from_iterable(hashed(tensor.name) for tensor in group)
            self._write_file(f"skeleton-{number:05d}.safetensors", header, data)

    def add_file(self, name: str, data: bytes) -> None:
        """Write a file of the tokenizer or a config."""
        self._write_file(name, data, ())

    def finish(
        self,
        *,
        heat: tuple[LayerHeat, ...] | None,
        buddies: BundleBuddies | None,
        prices: tuple[LayerPrices, ...] | None = None,
        plan: PackPlan | None = None,
        lineage: tuple[TunedWeights, ...] = (),
        sections: Mapping[str, Section] | None = None,
        profile_sha256: str | None,
        prove: Callable[[Path], None] | None = None,
    ) -> BundleManifest:
        """Write the manifest and give the bundle its name.

        `prove` is given the folder with everything in it; its error keeps the bundle from its name.
        """
        if self.finished:
            return read_json_artifact(self._out / MANIFEST, BundleManifest)
        assert self.n_written == len(self._plan.order)
        placed = source_sections(self._sources, self._plan.order, self._records)
        manifest = BundleManifest(
            tool_version=__version__,
            identity=self.spec.identity,
            shape=self.spec.shape,
            forms=self._plan.form_tables(self._records),
            removed=tuple(key for key in self.spec.order if key in self.spec.removed),
            skeleton=tuple(self._skeleton),
            skeleton_precision=self._skeleton_precision,
            skeleton_linears=self._skeleton_linears,
            files=(
                *(self._expert_files[file.name] for file in chain.from_iterable(self._plan.files)),
                *self._other_files,
            ),
            made_from=dict(self.spec.made_from),
            profile_sha256=profile_sha256,
            heat=heat,
            buddies=buddies,
            prices=prices,
            plan=plan,
            lineage=lineage,
            sections={**(sections or {}), **placed},
        )
        with storage_errors(self._folder):
            write_json_artifact(self._folder / MANIFEST, manifest)
        if prove is not None:
            prove(self._folder)
        with storage_errors(self._folder):
            (self._folder / JOURNAL).unlink()  # with it, a resume begins before the proof
            self._rename()
        return manifest

    def _require_same_finished(self) -> None:
        if not (self._out / MANIFEST).is_file():
            raise UsageError(
                f"{self._out} exists and is not a bundle", hint="choose another --out, or remove it"
            )
        with BundleReader.open(self._out) as found:
            self.spec.require_same_bundle(self._out, found.manifest)

    def _begin_or_resume(self) -> None:
        require_bundle_name(self._out)
        folder = self._folder
        folder.mkdir(parents=True, exist_ok=True)
        for torn in folder.glob(f".*{PART_SUFFIX}"):  # unfinished atomic writes of a killed run
            torn.unlink()
        names = {path.name for path in folder.iterdir()}
        if JOURNAL in names:
            self._adopt(read_journal(folder, self.spec))
            write_journal(folder, self.spec, self._records)  # without a torn last line
        elif MANIFEST in names:  # killed right before the rename
            found = read_json_artifact(folder / MANIFEST, BundleManifest)
            self.spec.require_same_bundle(folder, found)
            self._rename()
            self._require_same_finished()
            self.finished = True
        elif names:
            raise UsageError(
                f"{folder} exists and is not an interrupted bundle",
                hint=f"choose another --out, or remove {folder}",
            )
        else:
            write_journal(folder, self.spec, ())

    def _rename(self) -> None:
        sync_folder(self._folder)
        os.rename(self._folder, self._out)
        sync_folder(self._out.absolute().parent)

    def _adopt(self, lines: Sequence[bytes]) -> None:
        """Take over the records that match the journal, up to the first that does not."""
        for count, line in enumerate(lines):
            if count >= len(self._plan.order):
                return
            file, position = self._plan.places[count]
            if position == 0:
                self._open(file, anew=False)
            record = self._checked(line, file, position)
            if record is None:
                break
            self._records.append(record)
            if position == len(file.records) - 1:
                self._end_file(file)
        held = Counter(record.file for record in self._records)
        for name, opened in self._open_files.items():
            opened.cut(held[name])

    def _checked(self, line: bytes, file: ExpertFile, position: int) -> WrittenRecord | None:
        try:
            record = WrittenRecord.model_validate_json(line)
        except ValueError:
            return None
        found = (record.file, record.offset, (record.layer, record.expert))
        is_right = found == (file.name, file.offset(position), file.records[position])
        if is_right and self._open_files[file.name].take_over(position, record):
            return record
        return None

    def _open(self, file: ExpertFile, *, anew: bool) -> None:
        form = self._placed.get(file.name)
        if form is None or self._sources is None:
            self._open_files[file.name] = RecordFileWriter(self._folder, file, anew=anew)
        else:
            layout = self.forms[form].layout
            self._open_files[file.name] = PlacedFileWriter(file, layout, self._sources)

    def _end_file(self, file: ExpertFile) -> None:
        sha256 = self._open_files.pop(file.name).close()
        self._expert_files[file.name] = BundleFile(
            name=file.name, size_bytes=file.offset(len(file.records)), sha256=sha256
        )

    def _sync(self) -> None:
        """Sync the data first, then the lines that name them."""
        if not self._unsynced:
            return
        for name in {record.file for record in self._unsynced}:
            self._open_files[name].sync()
        append_to_journal(self._folder, self._unsynced)
        self._records += self._unsynced
        self._unsynced, self._unsynced_bytes = [], 0

    def _write_file(self, name: str, start: bytes, rest: Iterable[bytes | memoryview]) -> None:
        digest, size = hashlib.sha256(), 0
        path = self._folder / name
        path.unlink(missing_ok=True)  # torn by a kill
        with storage_errors(path), open(path, "xb") as file:
            for data in chain((start,), rest):
                file.write(data)
                digest.update(data)
                size += len(data)
            file.flush()
            os.fsync(file.fileno())
        self._other_files.append(BundleFile(name=name, size_bytes=size, sha256=digest.hexdigest()))
