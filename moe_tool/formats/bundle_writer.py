"""Writes a bundle so that it is whole or resumable: records in order, a journal of what is on the disk, the manifest last.

Everything goes to `<out>.part/`, which becomes `<out>/` by one rename at the very end. The journal names records only after their
bytes were fsynced, so that after a kill or a power cut all that it names is there; it is checked again on a resume.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path

import torch
import xxhash

from moe_tool import __version__
from moe_tool.artifacts.bundle_manifest import (
    BundleBuddies,
    BundleFile,
    BundleManifest,
    ExpertRecord,
    LayerHeat,
)
from moe_tool.artifacts.identity import ModelIdentity, require_same_model
from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.artifacts.precision import Precision
from moe_tool.errors import StorageError, UsageError
from moe_tool.formats.atomic_write import storage_errors, sync_folder
from moe_tool.formats.bundle_files import (
    MANIFEST,
    MAX_FILE_BYTES,
    PART_SUFFIX,
    ExpertFile,
    plan_expert_files,
    safetensors_header,
)
from moe_tool.formats.expert_record import RecordLayout, record_layout
from moe_tool.formats.json_artifact import read_json_artifact, write_json_artifact
from moe_tool.formats.safetensors_index import TensorInfo

_JOURNAL = "journal.jsonl"
_SYNC_BYTES = 256 * 2**20


class BundleWriter:
    """One bundle while it is being written."""

    def __init__(
        self,
        out: Path,
        *,
        identity: ModelIdentity,
        shape: MoeShape,
        precision: Precision,
        order: Sequence[tuple[int, int]],
        made_from: dict[str, str],
    ) -> None:
        """Use `open`."""
        self._out = out
        self._folder = out.with_name(out.name + PART_SUFFIX)
        self._identity = identity
        self._shape = shape
        self.precision = precision
        self._made_from = made_from
        self._layout: RecordLayout = record_layout(shape.expert_tensors, shape.dtype, precision)
        self._order = list(order)
        self._position = {key: position for position, key in enumerate(order)}
        self._plan: list[ExpertFile] = plan_expert_files(order, self._layout)
        self._records: list[ExpertRecord] = []
        self._unsynced: list[ExpertRecord] = []
        self._digests: dict[str, str] = {}
        self._file: int | None = None
        self._digest = hashlib.sha256()
        self._others: list[BundleFile] = []
        self.finished = False

    @classmethod
    def open(
        cls,
        out: Path,
        *,
        identity: ModelIdentity,
        shape: MoeShape,
        precision: Precision,
        order: Sequence[tuple[int, int]],
        made_from: dict[str, str],
    ) -> "BundleWriter":
        """Begin a bundle, go on with an interrupted one, or find it finished.

        Args:
            out: the bundle's folder.
            identity: of the model.
            shape: of the model.
            precision: of the records.
            order: every (layer, expert) in file order.
            made_from: options and input hashes; an interrupted or finished bundle with others is refused.

        Raises:
            UsageError: `out` holds something else, or was made with other options.
            WrongModelError: it was made from another model.
            StorageError: the disk refuses.
        """
        writer = cls(
            out,
            identity=identity,
            shape=shape,
            precision=precision,
            order=order,
            made_from=made_from,
        )
        if out.exists():
            writer._require_same_finished()
            writer.finished = True
            return writer
        with storage_errors(writer._folder):
            writer._begin_or_resume()
        return writer

    @property
    def layout(self) -> RecordLayout:
        """Of every record."""
        return self._layout

    def has_record(self, layer: int, expert: int) -> bool:
        """Return whether the record is written already; records are written in order."""
        return self.finished or self._position[layer, expert] < self.n_written

    @property
    def n_written(self) -> int:
        """Records written so far."""
        return len(self._order) if self.finished else len(self._records) + len(self._unsynced)

    def write_record(self, layer: int, expert: int, record: torch.Tensor) -> None:
        """Append the next record of the order.

        Args:
            record: uint8 [layout.size_bytes].

        Raises:
            DiskFullError, StorageError: the disk refuses; what was written stays for a resume.
        """
        assert self._order[self.n_written] == (layer, expert)
        file, position = self._place(self.n_written)
        data = memoryview(record.numpy()).cast("B")
        with storage_errors(self._folder / file.name):
            if position == 0:
                self._start_file(file)
            assert self._file is not None
            _write_all(self._file, data)
            self._digest.update(data)
            self._unsynced.append(
                ExpertRecord(
                    layer=layer,
                    expert=expert,
                    file=file.name,
                    offset=file.offset(position, self._layout),
                    xxh3=xxhash.xxh3_64_hexdigest(data),
                )
            )
            if position == len(file.records) - 1:
                self._sync()
                self._end_file(file)
            elif len(self._unsynced) * self._layout.size_bytes >= _SYNC_BYTES:
                self._sync()

    def suspend(self) -> None:
        """Make what was written durable and leave it for a resume."""
        with storage_errors(self._folder):
            self._sync()
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def write_skeleton(
        self, tensors: Sequence[TensorInfo], read: Callable[[str], bytes]
    ) -> None:
        """Write everything but the experts, under its names in the checkpoint.

        Args:
            tensors: what to write, in order.
            read: returns the bytes of one of them.
        """
        for number, group in enumerate(_by_size(tensors), start=1):
            name = f"skeleton-{number:05d}.safetensors"
            header = safetensors_header(
                [(info.name, info.dtype, info.shape, info.size_bytes) for info in group]
            )
            self._write_file(name, header, (read(info.name) for info in group))

    def add_file(self, name: str, data: bytes) -> None:
        """Write a file of the tokenizer or a config."""
        self._write_file(name, data, ())

    def finish(
        self,
        *,
        heat: tuple[LayerHeat, ...] | None,
        buddies: BundleBuddies | None,
        profile_sha256: str | None,
    ) -> BundleManifest:
        """Write the manifest and give the bundle its name."""
        if self.finished:
            return read_json_artifact(self._out / MANIFEST, BundleManifest)
        assert self.n_written == len(self._order)
        experts = [
            BundleFile(
                name=file.name,
                size_bytes=file.offset(len(file.records), self._layout),
                sha256=self._digests[file.name],
            )
            for file in self._plan
        ]
        manifest = BundleManifest(
            tool_version=__version__,
            identity=self._identity,
            shape=self._shape,
            precision=self.precision,
            record_size_bytes=self._layout.size_bytes,
            records=tuple(self._records),
            files=(*experts, *self._others),
            made_from=self._made_from,
            profile_sha256=profile_sha256,
            heat=heat,
            buddies=buddies,
        )
        with storage_errors(self._folder):
            (self._folder / _JOURNAL).unlink()
            write_json_artifact(self._folder / MANIFEST, manifest)
            os.rename(self._folder, self._out)
            sync_folder(self._out.absolute().parent)
        return manifest

    def _require_same_finished(self) -> None:
        if not (self._out / MANIFEST).is_file():
            raise UsageError(
                f"{self._out} exists and is not a bundle", hint="choose another --out, or remove it"
            )
        manifest = read_json_artifact(self._out / MANIFEST, BundleManifest)
        require_same_model(
            manifest.identity,
            self._identity,
            artifact=f"the bundle {self._out}",
            remedy="choose another --out, or remove the bundle",
        )
        self._require_same_options(self._out, manifest.made_from)

    def _require_same_options(self, folder: Path, found: dict[str, str]) -> None:
        for key in sorted(found.keys() | self._made_from.keys()):
            old, new = found.get(key, "none"), self._made_from.get(key, "none")
            if old != new:
                raise UsageError(
                    f"{folder} was packed with {key} {old[:60]}, asked is {key} {new[:60]}",
                    hint=f"repeat the command with the same options, choose another --out, or remove {folder}",
                )

    def _begin_or_resume(self) -> None:
        journal = self._folder / _JOURNAL
        if self._folder.exists() and not journal.is_file():
            if any(self._folder.iterdir()):
                raise UsageError(
                    f"{self._folder} exists and is not an interrupted bundle",
                    hint="choose another --out, or remove it",
                )
            shutil.rmtree(self._folder)
        if not self._folder.exists():
            self._folder.mkdir(parents=True)
            head = {"identity": self._identity.model_dump(), "made_from": self._made_from}
            _append(journal, [json.dumps(head)])
            return
        lines = journal.read_bytes().split(b"\n")
        self._require_same_journal(lines[0])
        self._adopt([line for line in lines[1:] if line])
        text = [lines[0].decode(), *(record.model_dump_json() for record in self._records)]
        journal.unlink()  # rewritten without what a kill tore
        _append(journal, text)

    def _require_same_journal(self, head: bytes) -> None:
        try:
            found = json.loads(head)
            identity = ModelIdentity.model_validate(found["identity"])
            made_from = dict(found["made_from"])
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{self._folder} is not an interrupted bundle: its journal is damaged",
                hint=f"remove {self._folder} and pack again",
            ) from error
        require_same_model(
            identity,
            self._identity,
            artifact=f"the interrupted bundle {self._folder}",
            remedy=f"choose another --out, or remove {self._folder}",
        )
        self._require_same_options(self._folder, made_from)

    def _adopt(self, lines: Sequence[bytes]) -> None:
        """Take over the records that the journal names and whose bytes are right, up to the first that is not."""
        for count, line in enumerate(lines):
            if count >= len(self._order):
                return
            file, position = self._place(count)
            if position == 0:
                self._reopen(file)
            record = self._checked(line, file, position)
            if record is None:
                break
            self._records.append(record)
            if position == len(file.records) - 1:
                self._end_file(file)
        if self._file is not None:
            file, position = self._place(self.n_written)
            os.ftruncate(self._file, file.offset(position, self._layout))
            os.lseek(self._file, 0, os.SEEK_END)

    def _reopen(self, file: ExpertFile) -> None:
        self._file = os.open(self._folder / file.name, os.O_RDWR | os.O_CREAT, 0o644)
        found = os.pread(self._file, len(file.header), 0)
        if found != file.header:
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, file.header, 0)
        self._digest = hashlib.sha256(file.header)

    def _checked(self, line: bytes, file: ExpertFile, position: int) -> ExpertRecord | None:
        try:
            record = ExpertRecord.model_validate_json(line)
        except ValueError:
            return None
        offset = file.offset(position, self._layout)
        if (record.layer, record.expert) != file.records[position] or record.offset != offset:
            return None
        assert self._file is not None
        data = os.pread(self._file, self._layout.size_bytes, offset)
        if len(data) < self._layout.size_bytes or xxhash.xxh3_64_hexdigest(data) != record.xxh3:
            return None
        self._digest.update(data)
        return record

    def _place(self, count: int) -> tuple[ExpertFile, int]:
        """The file of the record number `count`, and its position there."""
        per_file = len(self._plan[0].records)
        return self._plan[count // per_file], count % per_file

    def _start_file(self, file: ExpertFile) -> None:
        path = self._folder / file.name
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        _write_all(self._file, memoryview(file.header))
        self._digest = hashlib.sha256(file.header)

    def _end_file(self, file: ExpertFile) -> None:
        assert self._file is not None
        os.close(self._file)
        self._file = None
        self._digests[file.name] = self._digest.hexdigest()

    def _sync(self) -> None:
        """Data first, then the lines that name them."""
        if self._file is None or not self._unsynced:
            return
        os.fsync(self._file)
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)
        _append(
            self._folder / _JOURNAL, [record.model_dump_json() for record in self._unsynced]
        )
        self._records += self._unsynced
        self._unsynced = []

    def _write_file(self, name: str, start: bytes, rest: Iterable[bytes]) -> None:
        digest, size = hashlib.sha256(), 0
        path = self._folder / name
        with storage_errors(path), open(path, "wb") as file:
            for data in chain((start,), rest):
                file.write(data)
                digest.update(data)
                size += len(data)
            file.flush()
            os.fsync(file.fileno())
        self._others.append(BundleFile(name=name, size_bytes=size, sha256=digest.hexdigest()))


def _chain(start: bytes, rest: Iterable[bytes]):  # type: ignore[no-untyped-def]
    yield start
    yield from rest  # type: ignore[misc]


def _append(path: Path, lines: Sequence[str]) -> None:
    with open(path, "ab") as file:
        file.write("".join(line + "\n" for line in lines).encode())
        file.flush()
        os.fsync(file.fileno())


def _by_size(tensors: Sequence[TensorInfo]) -> list[list[TensorInfo]]:
    groups: list[list[TensorInfo]] = [[]]
    size = 0
    for info in tensors:
        if groups[-1] and size + info.size_bytes > MAX_FILE_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(info)
        size += info.size_bytes
    return groups


def _write_all(file: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        written = os.write(file, data[done:])
        if written <= 0:
            raise StorageError("the disk takes no more bytes")
        done += written
