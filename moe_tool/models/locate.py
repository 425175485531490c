"""Location of a model by folder, alias or hub id: local, cached or downloaded."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from moe_tool.budget.sizes import format_bytes
from moe_tool.errors import NotFoundError, UnsupportedModelError
from moe_tool.formats.atomic_write import require_free_disk
from moe_tool.formats.foreign_files import foreign_file
from moe_tool.formats.hub_probe import hub_is_reachable

DEMO_FOLDER = Path(__file__).resolve().parent.parent / "demo" / "model"
"""The embedded model."""

ALIASES: dict[str, str] = {
    "demo": str(DEMO_FOLDER),
    "mixtral": "mistralai/Mixtral-8x7B-v0.1",
    "mixtral-instruct": "mistralai/Mixtral-8x7B-Instruct-v0.1",
    "mixtral-8x22b": "mistralai/Mixtral-8x22B-v0.1",
    "qwen1.5-moe": "Qwen/Qwen1.5-MoE-A2.7B",
    "qwen2-moe": "Qwen/Qwen2-57B-A14B",
    "qwen3-moe": "Qwen/Qwen3-30B-A3B",
    "olmoe": "allenai/OLMoE-1B-7B-0924",
    "deepseek-v2-lite": "deepseek-ai/DeepSeek-V2-Lite",
    "phi-moe": "microsoft/Phi-3.5-MoE-instruct",
    "granite-moe": "ibm-granite/granite-3.1-3b-a800m-base",
    "ernie-moe": "baidu/ERNIE-4.5-21B-A3B-PT",
    "glm-moe": "zai-org/GLM-4.5-Air",
    "hunyuan-moe": "tencent/Hunyuan-A13B-Instruct",
    "minimax-m2": "MiniMaxAI/MiniMax-M2",
    "gpt-oss": "openai/gpt-oss-20b",
}
"""Folder or hub id by short name, for MODEL"""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_WANTED_FILES = ["*.safetensors", "*.json", "tokenizer.model", "*.jinja", "merges.txt", "vocab.txt"]
_MAX_INDEX_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class LocatedModel:
    """A checkpoint's folder and name."""

    folder: Path
    name: str
    """Alias or hub id as typed by the user, or the folder's own name."""


def model_to_type(name: str) -> str:
    """Return what to type as MODEL for the name in an artifact, which omits a folder's path."""
    return name if name in ALIASES or "/" in name else f"PATH/TO/{name}"


def _silent(_: str) -> None:
    pass


def locate_model(
    model: str, *, offline: bool = False, announce: Callable[[str], None] = _silent
) -> LocatedModel:
    """Find a model's folder; download it only if it is neither local nor cached.

    Args:
        model: a folder, an alias, or a hub id "owner/name".
        offline: never use the network.
        announce: called with a sentence on a download and its size.

    Raises:
        NotFoundError: it was not found and cannot be downloaded, or is a file.
        DiskFullError: the download does not fit.
        UnsupportedModelError: the hub has it without safetensors files, or it is a GGUF file.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return LocatedModel(folder=folder, name=folder.resolve().name)
    if folder.is_file() and model.lower() not in ALIASES:
        raise foreign_file(folder) or NotFoundError(
            f"{folder} is a file, a model is a folder",
            hint=f"give the folder of the checkpoint, e.g. {folder.parent}",
        )
    target = ALIASES.get(model.lower(), model)
    if Path(target).is_absolute() and Path(target).is_dir():
        return LocatedModel(folder=Path(target), name=model)
    if not _HUB_ID.fullmatch(target):
        raise NotFoundError(
            f"{model} is no folder, no hub id (owner/name) and no alias",
            hint=f"give a checkpoint's folder, or one of {', '.join(ALIASES)}",
        )
    cached = _cached_snapshot(target)
    if cached is not None:
        return LocatedModel(folder=cached, name=model)
    if offline or not hub_is_reachable():
        raise _not_found(model, target, offline=offline)
    return LocatedModel(folder=_download(target, announce), name=model)


def _not_found(model: str, hub_id: str, *, offline: bool) -> NotFoundError:
    reason = "the network is forbidden" if offline else "the hub cannot be reached"
    called = model if model == hub_id else f"{model} ({hub_id})"
    return NotFoundError(
        f"{called} is not here and {reason}: looked for the folder {Path(model).absolute()} "
        f"and in the Hugging Face cache {_cache_folder()}",
        hint="give the path of a local folder that holds the checkpoint; or connect to the network "
        "(or point HF_HOME at a cache that holds it) and try again",
    )


def _cache_folder() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _cached_snapshot(hub_id: str) -> Path | None:
    """Return the snapshot that `main` points at, or else the newest one, if it is complete."""
    repository = _cache_folder() / f"models--{hub_id.replace('/', '--')}"
    snapshots = repository / "snapshots"
    if not snapshots.is_dir():
        return None
    candidates = sorted(snapshots.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    reference = repository / "refs" / "main"
    if reference.is_file() and reference.stat().st_size <= 256:
        wanted = reference.read_text(encoding="ascii", errors="replace").strip()
        candidates.sort(key=lambda path: path.name != wanted)
    return next((folder for folder in candidates if _is_complete(folder)), None)


def _is_complete(folder: Path) -> bool:
    if not (folder / "config.json").is_file():
        return False
    if (folder / "model.safetensors").is_file():
        return True
    index = folder / "model.safetensors.index.json"
    if not index.is_file() or index.stat().st_size > _MAX_INDEX_BYTES:
        return False
    try:
        shards = set(json.loads(index.read_bytes())["weight_map"].values())
        return bool(shards) and all((folder / shard).is_file() for shard in shards)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _download(hub_id: str, announce: Callable[[str], None]) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        files = HfApi().model_info(hub_id, files_metadata=True).siblings or []
        # Some repositories keep a second copy of the weights in a folder; it is not wanted.
        top = [file for file in files if "/" not in file.rfilename]
        wanted = [
            file
            for file in top
            if any(fnmatch(file.rfilename, pattern) for pattern in _WANTED_FILES)
        ]
        if not any(file.rfilename.endswith(".safetensors") for file in wanted):
            raise UnsupportedModelError(
                f"{hub_id} has no safetensors files", hint="only safetensors checkpoints are read"
            )
        size_bytes = sum(file.size or 0 for file in wanted)
        cache = _cache_folder()
        cache.mkdir(parents=True, exist_ok=True)
        require_free_disk(cache, size_bytes)
        announce(f"downloading {hub_id}: {format_bytes(size_bytes)} into {cache}")
        names = [file.rfilename for file in wanted]
        return Path(snapshot_download(hub_id, allow_patterns=names))
    except (HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise NotFoundError(
            f"{hub_id} could not be downloaded: {reason}",
            hint="check the name and the network, log in (hf auth login) if the model is gated, "
            "or give a local folder",
        ) from error
