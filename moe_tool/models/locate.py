"""Location of a model by folder, alias or hub id: local, cached or downloaded."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moe_tool.artifacts.identity import HubRevision
from moe_tool.artifacts.model_names import ALIASES
from moe_tool.errors import NotFoundError, UsageError
from moe_tool.formats.foreign_files import foreign_folder
from moe_tool.formats.given_kind import kind_of
from moe_tool.formats.home_folder import from_home
from moe_tool.formats.hub_probe import hub_is_reachable
from moe_tool.formats.wrong_kind import wrong_kind
from moe_tool.models.hub_cache import Snapshot, cache_folder, complete_revisions, find_snapshot

if TYPE_CHECKING:
    from moe_tool.formats.discarded_source import DiscardedSource

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_REVISION = re.compile(r"[\w.][\w./-]{0,127}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LocatedModel:
    """A checkpoint's folder and name."""

    folder: Path
    name: str
    """Alias or hub id as typed by the user, or the folder's own name."""
    tokenizer: Path | None = None
    """Folder of a tokenizer that goes before the checkpoint's own"""
    hub: HubRevision | None = None
    """Revision that was downloaded; None: a local folder"""
    gone: "DiscardedSource | None" = None
    """State of an interrupted pack that deleted shards of it"""

    @property
    def tokenizer_folder(self) -> Path:
        """Folder of the tokenizer to use"""
        return self.tokenizer or self.folder


def _silent(_: str) -> None:
    pass


def locate_model(
    model: str,
    *,
    revision: str | None = None,
    tokenizer: Path | None = None,
    offline: bool = False,
    gone: "DiscardedSource | None" = None,
    announce: Callable[[str], None] = _silent,
) -> LocatedModel:
    """Find a model's folder; download it only if it is neither local nor cached.

    Args:
        model: a folder, an alias, or a hub id "owner/name" or "owner/name@revision".
        revision: branch, tag or commit on the hub; None: main.
        tokenizer: folder of a tokenizer that goes before the checkpoint's own.
        offline: never use the network.
        gone: state of an interrupted pack, whose deleted shards are not downloaded again.
        announce: called with a sentence on the revision taken, and on a download and its size.

    Raises:
        UsageError: a revision is given twice, or for a folder.
        NotFoundError: it was not found and cannot be downloaded, or is a file.
        DiskFullError: the download does not fit.
        UnsupportedModelError, CorruptArtifactError: the hub has it in a form that is not read,
            which is found out before the weights are downloaded.
    """
    if tokenizer is not None and not tokenizer.is_dir():
        raise NotFoundError(
            f"--tokenizer {tokenizer} is not a folder",
            hint="give a folder that holds tokenizer.json or tokenizer.model",
        )
    folder = _local_folder(model, revision)
    if folder is not None:
        name = model if model.lower() in ALIASES else folder.resolve().name
        return LocatedModel(folder=folder, name=name, tokenizer=tokenizer)
    name, revision = _split_revision(model, revision)
    hub_id = ALIASES.get(name.lower(), name)
    if not _HUB_ID.fullmatch(hub_id):
        raise NotFoundError(
            f"{model} is no folder, no hub id (owner/name) and no alias",
            hint=f"give a checkpoint's folder, or one of {', '.join(ALIASES)}",
        )
    hub = None if gone is None else gone.hub
    freed = gone.state.freed if gone is not None else ()
    found = find_snapshot(hub_id, revision, needs_tokenizer=tokenizer is None, freed=freed)
    if found is not None and hub != HubRevision(hub_id=hub_id, commit=found.revision):
        gone = None
        found = find_snapshot(hub_id, revision, needs_tokenizer=tokenizer is None)
    if found is None or found.missing is not None:
        if offline or not hub_is_reachable():
            raise _not_found(model, hub_id, found, offline=offline)
        from moe_tool.models.hub_download import download

        found = download(hub_id, revision, tokenizer=tokenizer, announce=announce)
    announce(f"{hub_id}: revision {found.revision}")
    hub = HubRevision(hub_id=hub_id, commit=found.revision)
    return LocatedModel(folder=found.folder, name=name, tokenizer=tokenizer, hub=hub, gone=gone)


def _local_folder(model: str, revision: str | None) -> Path | None:
    """Return the folder that `model` is, or that its alias names."""
    folder = from_home(model)
    if folder.is_dir() and revision is not None:
        raise UsageError(
            f"--revision {revision} beside a folder, which has no revisions",
            hint="leave --revision out, or give a hub id",
        )
    given = kind_of(folder)
    if folder.is_dir():
        if given.kind in ("folder", "empty-folder") and (foreign := foreign_folder(folder)):
            raise foreign
        if given.kind != "model":
            raise wrong_kind(folder, given, "model")
        return folder
    if given.kind != "missing" and model.lower() not in ALIASES:
        raise wrong_kind(folder, given, "model")
    target = Path(ALIASES.get(model.lower(), "."))
    return target if target.is_absolute() and target.is_dir() else None


def _split_revision(model: str, revision: str | None) -> tuple[str, str | None]:
    """Return name and revision of "owner/name@revision" and of `--revision`."""
    name, at, named = model.partition("@")
    if at and revision is not None and named != revision:
        raise UsageError(
            f"{model} names a revision, and --revision {revision} another", hint="give one of them"
        )
    revision = named if at else revision
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise UsageError(
            f"{revision[:64]!r} is no name of a revision", hint="give a branch, a tag or a commit"
        )
    return name, revision


def _not_found(model: str, hub_id: str, found: Snapshot | None, *, offline: bool) -> NotFoundError:
    reason = "--offline forbids the network" if offline else "the hub cannot be reached"
    way_out = "leave out --offline" if offline else "connect to the network and try again"
    called = model if model.partition("@")[0] == hub_id else f"{model} ({hub_id})"
    if found is not None:
        others = [name for name in complete_revisions(hub_id) if name != found.revision]
        other = f", or take the complete revision here: {hub_id}@{others[0]}" if others else ""
        return NotFoundError(
            f"revision {found.revision} of {called} is here without {found.missing}, "
            f"and {reason}: {found.folder}",
            hint=f"{way_out}: the rest is downloaded{other}",
        )
    return NotFoundError(
        f"{called} is not here and {reason}: looked for the folder {Path(model).absolute()} "
        f"and in the Hugging Face cache {cache_folder()}",
        hint="give the path of a local folder that holds the checkpoint, or point HF_HOME at a "
        f"cache that holds it; or {way_out}",
    )
