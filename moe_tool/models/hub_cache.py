"""Snapshots of a model in the local Hugging Face cache, and what they lack."""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Files of which a tokenizer has at least one"""
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_COMMIT = re.compile(r"[0-9a-f]{7,40}")
_MAX_INDEX_BYTES = 64 * 2**20
_MAX_REFERENCE_BYTES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One revision of a model in the cache."""

    folder: Path
    revision: str
    """Commit"""
    missing: str | None = None
    """First file that it lacks; None: complete"""


def cache_folder() -> Path:
    """Return the folder of the Hugging Face cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def find_snapshot(
    hub_id: str,
    revision: str | None,
    *,
    needs_tokenizer: bool = True,
    freed: Collection[str] = (),
) -> Snapshot | None:
    """Return the cached snapshot of a revision, complete or not; None if there is none.

    Args:
        hub_id: "owner/name".
        revision: branch, tag, or commit (at least 7 digits); None: main, or the newest complete
            snapshot of a cache that knows no main.
        needs_tokenizer: whether a snapshot without a tokenizer lacks something.
        freed: weight files that are not missed.
    """
    commit = _commit(hub_id, revision or "main")
    if commit is not None:
        folder = _repository(hub_id) / "snapshots" / commit
        missing = missing_file(folder, needs_tokenizer=needs_tokenizer, freed=freed)
        return Snapshot(folder=folder, revision=commit, missing=missing)
    if revision is not None:
        return None
    newest = _by_age(hub_id)
    for folder in newest:
        if missing_file(folder, needs_tokenizer=needs_tokenizer) is None:
            return Snapshot(folder=folder, revision=folder.name)
    if not newest:
        return None
    missing = missing_file(newest[0], needs_tokenizer=needs_tokenizer)
    return Snapshot(folder=newest[0], revision=newest[0].name, missing=missing)


def complete_revisions(hub_id: str) -> list[str]:
    """Return the commits of all complete snapshots, the newest first."""
    return [folder.name for folder in _by_age(hub_id) if missing_file(folder) is None]


def missing_file(
    folder: Path, *, needs_tokenizer: bool = True, freed: Collection[str] = ()
) -> str | None:
    """Return the first file that a checkpoint's folder lacks; None if it is complete."""
    if not (folder / "config.json").is_file():
        return "config.json"
    if needs_tokenizer and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return TOKENIZER_FILES[0]
    if (folder / _SINGLE).is_file() or _SINGLE in freed:
        return None
    index = folder / _INDEX
    if not index.is_file() or index.stat().st_size > _MAX_INDEX_BYTES:
        return f"{_SINGLE} or {_INDEX}"
    try:
        shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        wanted = (str(shard) for shard in shards if shard not in freed)
        return next((shard for shard in wanted if not (folder / shard).is_file()), None)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"a readable {_INDEX}"


def _repository(hub_id: str) -> Path:
    return cache_folder() / f"models--{hub_id.replace('/', '--')}"


def _by_age(hub_id: str) -> list[Path]:
    snapshots = _repository(hub_id) / "snapshots"
    if not snapshots.is_dir():
        return []
    return sorted(snapshots.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)


def _commit(hub_id: str, revision: str) -> str | None:
    """Return the commit of a revision, if the cache knows it and has a snapshot of it."""
    snapshots = {folder.name for folder in _by_age(hub_id)}
    reference = _repository(hub_id) / "refs" / revision
    if reference.is_file() and reference.stat().st_size <= _MAX_REFERENCE_BYTES:
        commit = reference.read_text(encoding="ascii", errors="replace").strip()
        return commit if commit in snapshots else None
    if revision in snapshots:
        return revision
    begun = [name for name in snapshots if name.startswith(revision)]
    return begun[0] if len(begun) == 1 and _COMMIT.fullmatch(revision) else None
