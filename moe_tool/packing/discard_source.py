"""Deletion of downloaded shards while they are packed, for `pack --discard-source`."""

import hashlib
import os
import shutil
from pathlib import Path

from moe_tool.artifacts.identity import HubRevision
from moe_tool.errors import NotFoundError, UsageError
from moe_tool.formats.atomic_write import (
    atomic_write_bytes,
    require_free_disk,
    storage_errors,
    sync_folder,
)
from moe_tool.formats.bundle_files import partial_folder, safetensors_file
from moe_tool.formats.bundle_writer import BundleWriter
from moe_tool.formats.discarded_source import (
    FOLDER,
    DiscardedSource,
    DiscardState,
    link_or_copy,
)
from moe_tool.formats.hostile_file import reading
from moe_tool.formats.safetensors_index import Checkpoint
from moe_tool.models.architecture import OpenedModel
from moe_tool.packing.plan_pack import PackJob
from moe_tool.packing.prove_bundle import SourceForward, forward_source
from moe_tool.packing.skeleton_work import SkeletonWork
from moe_tool.progress import Progress

_REFERENCE = "reference.safetensors"
_SYNC_BYTES = 256 * 2**20
"""Records that may be written before a shard of theirs is deleted"""


class DiscardSource:
    """Shards of one checkpoint in the Hugging Face cache, each with the records that need it."""

    def __init__(
        self, hub: HubRevision, job: PackJob, opened: OpenedModel, *, offline: bool
    ) -> None:
        """Keep the parts together.

        Args:
            hub: revision that the shards belong to.
            job: the bundle.
            opened: the checkpoint.
            offline: whether a shard that is needed again must not be downloaded.

        Raises:
            UsageError: forms are fitted to tokens, for which a resume needs the whole checkpoint.
        """
        if job.tokens is not None:
            raise UsageError(
                "--discard-source beside forms that are fitted to or measured on a profile's "
                "tokens: an interrupted pack needs the whole checkpoint again",
                hint="leave --discard-source out, or use --quantizer rtn or hqq without --replicas",
            )
        self._job = job
        self._offline = offline
        self._opened = opened
        state = DiscardState(
            hub_id=hub.hub_id,
            commit=hub.commit,
            identity=opened.identity,
            kept=opened.kept_precision(),
        )
        folder = partial_folder(job.out) / FOLDER
        self._gone = opened.gone or DiscardedSource(folder=folder, state=state)
        self.shards = sorted({info.file for info in opened.checkpoint.raw.tensors.values()})
        self._last: dict[Path, int] = {}
        """Shard -> number of the last record that needs it"""
        self._n_seen = -1

    @property
    def freed(self) -> dict[str, int]:
        """Size of the deleted shards by name"""
        return self._gone.state.freed

    def begin(self, writer: BundleWriter, skeleton: SkeletonWork, progress: Progress) -> None:
        """Write the skeleton, or take over the one of an interrupted run; keep what a resume and
        the proof need.

        Raises:
            DiskFullError: the bundle does not fit, even with the shards' space.
            NotFoundError: a deleted shard is needed again and cannot be downloaded.
            CorruptArtifactError, StorageError: as the checkpoint and the disk.
        """
        job, gone = self._job, self._gone
        for number, (_, layer, expert) in enumerate(writer.to_write, start=writer.n_written):
            for tensor in job.spec.shape.expert_tensors:
                places = self._opened.experts.places(layer, tensor.name, expert)
                self._last |= {info.file: number for infos in places.values() for info in infos}
        old = self._old_skeleton()
        has_reference = (gone.folder / _REFERENCE).is_file()
        needed = self.shards if old is None or not has_reference else list(self._last)
        self._fetch([path for path in needed if not path.is_file()], progress)
        self._require_disk(writer, skeleton)
        gone.folder.mkdir(exist_ok=True)
        if not has_reference:
            made = forward_source(job.loader, self._opened, rows=job.rows)
            tensors = {f"state.{k:06d}": state for k, state in enumerate(made.states)}
            data = safetensors_file({"logits": made.logits, **tensors})
            atomic_write_bytes(gone.folder / _REFERENCE, data)
        skeleton.write(writer, progress, written=old)
        if old is not None:
            old.close()
            return
        digests = {}
        for path in sorted(gone.folder.parent.glob("skeleton-*.safetensors")):
            link_or_copy(path, gone.folder / path.name)
            digests[path.name] = _sha256(path)
        self._gone = gone.save(gone.state.model_copy(update={"skeleton": digests}))

    def free(self, writer: BundleWriter) -> None:
        """Delete the shards of which everything is on the disk."""
        if writer.n_durable == self._n_seen:
            return
        self._n_seen = writer.n_durable
        for path in self.shards:
            if self._last.get(path, -1) < writer.n_durable and path.is_file():
                blob = _blob(path)
                if blob is not None:
                    self._delete(path, blob)

    def reference(self) -> SourceForward:
        """Return the checkpoint's forward, made before the first shard was deleted.

        Raises:
            CorruptArtifactError, StorageError: it is damaged.
        """
        with Checkpoint.open_files([self._gone.folder / _REFERENCE]) as kept:
            names = [name for name in kept.tensors if name != "logits"]
            return SourceForward(logits=kept.read("logits"), states=[kept.read(n) for n in names])

    def _old_skeleton(self) -> Checkpoint | None:
        files = {self._gone.folder / n: sha for n, sha in self._gone.state.skeleton.items()}
        if not files or any(not p.is_file() or _sha256(p) != sha for p, sha in files.items()):
            return None
        return Checkpoint.open_files(list(files))

    def _fetch(self, missing: list[Path], progress: Progress) -> None:
        from moe_tool.models.hub_download import download_shard

        for path in missing:
            if self._offline:
                raise NotFoundError(
                    f"{path.name} was deleted once it was packed, and is needed again because "
                    "records are damaged",
                    hint="run the command again without --offline: it is downloaded",
                )
            progress.note(f"{path.name} is needed again: it is downloaded")
            download_shard(self._gone.hub, path.name)

    def _require_disk(self, writer: BundleWriter, skeleton: SkeletonWork) -> None:
        """Refuse a bundle that does not fit, counting what becomes free on the same disk."""
        folder = self._job.out.absolute().parent
        with storage_errors(folder):
            is_same = os.stat(folder).st_dev == os.stat(self._job.folder).st_dev
            sizes = {path: path.stat().st_size for path in self.shards if path.is_file()}
        written = most = skeleton.size_bytes
        ends: dict[int, int] = {}
        for path, number in self._last.items():
            ends[number] = ends.get(number, 0) + sizes.get(path, 0)
        for number, (form, _, _) in enumerate(writer.to_write, start=writer.n_written):
            written += writer.forms[form].layout.size_bytes
            most = max(most, written)
            written -= ends.get(number, 0) if is_same else 0
        require_free_disk(folder, most + (_SYNC_BYTES if is_same else 0))

    def _delete(self, path: Path, blob: Path) -> None:
        gone = self._gone
        with storage_errors(path):
            size = path.stat().st_size
            gone.keep_header(path)
            freed = {**gone.state.freed, path.name: size}
            sync_folder(gone.folder.parent)
            self._gone = gone.save(gone.state.model_copy(update={"freed": freed}))
            self._opened.checkpoint.raw.close_file(path)
            blob.unlink()
            path.unlink(missing_ok=True)


def forget_source(out: Path) -> None:
    """Remove what a finished bundle no longer needs."""
    shutil.rmtree(out / FOLDER, ignore_errors=True)


def _blob(path: Path) -> Path | None:
    """Return the file behind a shard's name; None if it is not the cache's, or if another revision
    in the cache needs it."""
    blob, snapshots = path.resolve(), path.parent.parent
    others = [each for each in snapshots.glob("*/*.safetensors") if each.parent != path.parent]
    is_own = blob.parent in (path.parent.resolve(), (snapshots.parent / "blobs").resolve())
    return blob if is_own and all(each.resolve() != blob for each in others) else None


def _sha256(path: Path) -> str:
    with reading(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
