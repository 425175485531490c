"""State of a checkpoint whose shards are deleted while it is packed."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from moe_tool.artifacts.form_table import Basename, SizeBytes
from moe_tool.artifacts.identity import HexDigest, HubRevision, ModelIdentity
from moe_tool.artifacts.precision import KeptPrecision
from moe_tool.artifacts.schema import FrozenModel
from moe_tool.errors import CorruptArtifactError, UsageError
from moe_tool.formats.atomic_write import atomic_write_bytes
from moe_tool.formats.bundle_files import MANIFEST, partial_folder
from moe_tool.formats.hostile_file import read_capped
from moe_tool.formats.safetensors_index import (
    MAX_HEADER_BYTES,
    Checkpoint,
    TensorInfo,
    parse_header,
    read_header,
)
from moe_tool.formats.shard_index import read_weight_map

FOLDER, _STATE = ".source", "state.json"
_INDEX = "model.safetensors.index.json"
_MAX_BYTES = 64 * 2**20


class DiscardState(FrozenModel):
    """Content of the state file."""

    hub_id: str
    commit: str
    identity: ModelIdentity
    kept: KeptPrecision | None
    """Precision of the experts' codes on disk; None: they are not kept"""
    skeleton: dict[Basename, HexDigest] = {}
    """File of the skeleton -> its sha256, once all are written"""
    freed: dict[Basename, SizeBytes] = {}
    """Deleted shard -> its size"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscardedSource:
    """The state in the folder of a half-written bundle."""

    folder: Path
    state: DiscardState

    @property
    def hub(self) -> HubRevision:
        """Revision that the shards belong to"""
        return HubRevision(hub_id=self.state.hub_id, commit=self.state.commit)

    def save(self, state: DiscardState) -> "DiscardedSource":
        """Write another state and return it."""
        atomic_write_bytes(self.folder / _STATE, state.model_dump_json().encode())
        return DiscardedSource(folder=self.folder, state=state)

    def keep_header(self, shard: Path) -> None:
        """Keep the header of a shard that is to be deleted.

        Raises:
            StorageError: it cannot be read or written.
        """
        end = min(info.offset for info in read_header(shard).values())
        with open(shard, "rb") as file:
            atomic_write_bytes(self.folder / f"{shard.name}.header", file.read(end))

    def open_checkpoint(self, folder: Path) -> Checkpoint:
        """Open a checkpoint without its deleted shards, whose tensors are there but unreadable.

        Raises:
            CorruptArtifactError, NotFoundError, StorageError: as `Checkpoint.open_folder`.
        """
        single = {"": "model.safetensors"}
        map_ = read_weight_map(folder / _INDEX) if (folder / _INDEX).is_file() else single
        headers = {shard: self._header(folder / shard) for shard in set(map_.values())}
        found = {n: headers[shard][n] for n, shard in map_.items() if n in headers[shard]}
        checkpoint = Checkpoint(found if map_ is not single else headers["model.safetensors"])
        checkpoint.requires_finite = True
        return checkpoint

    def _header(self, shard: Path) -> Mapping[str, TensorInfo]:
        if shard.is_file() or shard.name not in self.state.freed:
            return read_header(shard)
        path = self.folder / f"{shard.name}.header"
        remedy = f"remove {self.folder.parent} and pack again"
        beginning = read_capped(path, limit_bytes=MAX_HEADER_BYTES + 8, remedy=remedy)
        return parse_header(shard, beginning, file_bytes=self.state.freed[shard.name])


def read_discarded(out: Path) -> DiscardedSource | None:
    """Return the state of an interrupted pack of the bundle `out`; None if there is none.

    Raises:
        UsageError: the bundle is finished.
        CorruptArtifactError: the state is damaged.
        StorageError: it cannot be read.
    """
    if (out / MANIFEST).is_file():
        raise UsageError(
            f"--discard-source: the bundle {out} is finished",
            hint=f"choose another --out, or remove {out}",
        )
    folder = partial_folder(out) / FOLDER
    if not (folder / _STATE).is_file():
        return None
    remedy = f"remove {folder.parent} and pack again"
    try:
        text = read_capped(folder / _STATE, limit_bytes=_MAX_BYTES, remedy=remedy)
        return DiscardedSource(folder=folder, state=DiscardState.model_validate_json(text))
    except ValidationError as error:
        raise CorruptArtifactError(f"{folder / _STATE} is damaged", hint=remedy) from error


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the disk has no links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
