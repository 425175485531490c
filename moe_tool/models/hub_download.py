"""Download of a checkpoint from the Hugging Face hub, judged before any weight is fetched."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # its client's
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    get_session,
    hf_raise_for_status,
)

from moe_tool.artifacts.identity import HubRevision
from moe_tool.budget.sizes import format_bytes
from moe_tool.errors import CorruptArtifactError, NotFoundError, UnsupportedModelError
from moe_tool.formats.atomic_write import require_free_disk
from moe_tool.formats.hostile_file import one_line
from moe_tool.formats.safetensors_index import (
    MAX_HEADER_BYTES,
    Checkpoint,
    TensorInfo,
    parse_header,
)
from moe_tool.formats.shard_index import read_weight_map
from moe_tool.models.architecture import check_headers
from moe_tool.models.generation_settings import read_generation_settings
from moe_tool.models.hub_cache import Snapshot, cache_folder
from moe_tool.models.model_config import read_config
from moe_tool.models.tokenizer import load_tokenizer

_SMALL_FILES = ("*.json", "tokenizer.model", "*.jinja", "merges.txt", "vocab.txt")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PREFIX_BYTES = 8
_MOST_NAMES = 12
"""Names of files that a message lists"""


def download(
    hub_id: str,
    revision: str | None,
    *,
    tokenizer: Path | None,
    announce: Callable[[str], None],
) -> Snapshot:
    """Download a checkpoint into the cache, in the order of what is cheap to find out.

    First config.json, index and tokenizer, then the headers of the weight files, then the weight
    files that the index names, if everything before says that the model can be read.

    Args:
        hub_id: "owner/name".
        revision: branch, tag or commit; None: main.
        tokenizer: folder of a tokenizer that replaces the checkpoint's own.
        announce: told what is downloaded, and how much.

    Raises:
        NotFoundError: hub, model, revision or a file cannot be reached.
        UnsupportedModelError, CorruptArtifactError: the model cannot be read.
        DiskFullError: it does not fit.
    """
    with _downloading(hub_id):
        info = HfApi().model_info(hub_id, revision=revision, files_metadata=True)
        _refuse_gguf_alone(hub_id, [f.rfilename for f in info.siblings or []])
        branch = revision or "main"  # by its name, so that the cache remembers what it points at
        # A second copy of the weights in a subfolder is not wanted.
        sizes = {f.rfilename: f.size or 0 for f in info.siblings or [] if "/" not in f.rfilename}
        small = [name for name in sizes if any(fnmatch(name, p) for p in _SMALL_FILES)]
        folder = Path(snapshot_download(hub_id, revision=branch, allow_patterns=small))
        if info.sha not in (None, folder.name):
            raise NotFoundError(
                f"{hub_id}: {branch} moved from {info.sha} to {folder.name} during the download",
                hint="run the same command again; what was downloaded is kept",
            )
        read_config(folder)
        load_tokenizer(tokenizer or folder)
        read_generation_settings(folder)
        weights = _weight_files(hub_id, folder, sizes)
        _require_sizes(hub_id, {name: sizes[name] for name in weights})
        n_bytes = sum(sizes[name] for name in weights)
        require_free_disk(cache_folder(), n_bytes)
        _check_remote_headers(hub_id, folder.name, folder, {name: sizes[name] for name in weights})
        announce(f"downloading {hub_id}: {format_bytes(n_bytes)} into {cache_folder()}")
        # By its commit, which has been judged: the branch may have moved.
        snapshot_download(hub_id, revision=folder.name, allow_patterns=[*small, *weights])
    return Snapshot(folder=folder, revision=folder.name)


def download_shard(hub: HubRevision, name: str) -> None:
    """Download one weight file of a revision into the cache.

    Raises:
        NotFoundError: it cannot be reached.
    """
    with _downloading(hub.hub_id):
        hf_hub_download(hub.hub_id, name, revision=hub.commit)


@contextmanager
def _downloading(hub_id: str) -> Iterator[None]:
    try:
        yield
    except (HTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise NotFoundError(
            f"{hub_id} could not be downloaded: {reason}",
            hint="check name, revision and network, log in (hf auth login) if the model is gated, "
            "or give a local folder; what was downloaded is kept",
        ) from error
    except (ValueError, TypeError, KeyError) as error:  # what a broken proxy or mirror answers
        raise NotFoundError(
            f"{hub_id} could not be downloaded: the hub's answer is not understood",
            hint="check HF_ENDPOINT and the proxy, or give a local folder",
        ) from error


def _refuse_gguf_alone(hub_id: str, names: Sequence[str]) -> None:
    """Refuse a repository of GGUF files: config.json and tokenizer are another repository's."""
    files = sorted(name for name in names if name.endswith(".gguf"))
    if not files or _SINGLE in names or _INDEX in names:
        return
    shown = ", ".join(map(one_line, files[:_MOST_NAMES]))
    more = f" and {len(files) - _MOST_NAMES} more" if len(files) > _MOST_NAMES else ""
    raise UnsupportedModelError(
        f"{hub_id} holds its weights as GGUF, which is read from a local folder only: "
        f"{shown}{more}",
        hint=f"choose one FILE of these: hf download {hub_id} FILE --local-dir FOLDER; from "
        "ORIGINAL, the model that it was made from: hf download ORIGINAL config.json "
        "tokenizer.json tokenizer_config.json generation_config.json --local-dir FOLDER; then give "
        "FOLDER, with the .gguf file directly in it",
    )


def _weight_files(hub_id: str, folder: Path, sizes: Mapping[str, int]) -> list[str]:
    """Return the weight files that a reader of the checkpoint opens."""
    if _SINGLE in sizes:
        return [_SINGLE]
    if _INDEX not in sizes:
        raise UnsupportedModelError(
            f"{hub_id} holds neither {_SINGLE} nor {_INDEX}",
            hint="give the id of the model in safetensors",
        )
    shards = sorted(set(read_weight_map(folder / _INDEX).values()))
    for shard in shards:
        if shard not in sizes:
            raise CorruptArtifactError(
                f"{hub_id} lacks the shard {shard} that its index names",
                hint="use another revision of the model",
            )
    return shards


def _require_sizes(hub_id: str, sizes: Mapping[str, int]) -> None:
    for name, n_bytes in sizes.items():
        if n_bytes <= 0:
            raise NotFoundError(
                f"{hub_id} could not be downloaded: the hub says that {name} has {n_bytes} bytes, "
                "or does not say how many",
                hint="check HF_ENDPOINT and the proxy, or give a local folder",
            )


def _check_remote_headers(hub_id: str, commit: str, folder: Path, sizes: Mapping[str, int]) -> None:
    """Read the headers of weight files on the hub and compare them with config.json."""
    tensors: dict[str, TensorInfo] = {}
    for name, n_bytes in sizes.items():
        url = hf_hub_url(hub_id, name, revision=commit)
        tensors |= parse_header(folder / name, _remote_header(url, n_bytes), file_bytes=n_bytes)
    check_headers(folder, Checkpoint(tensors))


def _remote_header(url: str, file_bytes: int) -> bytes:
    """Return the length and text of a safetensors header, from the beginning of a remote file."""
    beginning = _fetch(url, _PREFIX_BYTES)
    length = int.from_bytes(beginning, "little")
    return _fetch(url, _PREFIX_BYTES + min(length, MAX_HEADER_BYTES, file_bytes))


def _fetch(url: str, n_bytes: int) -> bytes:
    """Return the first bytes of a remote file, from servers that ignore ranges too."""
    headers: dict[str, Any] = {**build_hf_headers(), "range": f"bytes=0-{n_bytes - 1}"}
    found = bytearray()
    with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
        hf_raise_for_status(response)
        for chunk in response.iter_bytes():
            found += chunk
            if len(found) >= n_bytes:
                break
    return bytes(found[:n_bytes])
