"""Documents from data sets of the Hugging Face hub, streamed or from the local cache."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moe_tool.errors import DataSourceError, NotFoundError
from moe_tool.formats.home_folder import from_home
from moe_tool.formats.hub_probe import hub_endpoint, hub_is_forbidden, hub_is_reachable
from moe_tool.text import TEXT_FIELDS

if TYPE_CHECKING:
    import datasets

_SPLITS = frozenset({"train", "validation", "test"})
_SHUFFLE_BUFFER = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class HubDataset:
    """One split of a data set on the hub."""

    name: str
    """Id org/name."""
    config: str | None
    """Configuration; None: the data set's default."""
    split: str


def parse_hub_spec(spec: str) -> HubDataset:
    """Parse `org/name[:config][:split]`.

    A single extra word is a split if it is train, validation or test, else a config.
    """
    name, *words = spec.split(":")
    split = "train"
    if len(words) == 2 or (words and words[-1] in _SPLITS):
        split = words.pop()
    return HubDataset(name=name, config=words[0] if words else None, split=split)


def require_hub_dataset(spec: str, *, domain: str, offline: bool) -> bool:
    """Return whether a data set is read from the network (True) or from the local cache.

    Raises:
        NotFoundError: no network and not in the cache; raised within about a second.
    """
    wanted = parse_hub_spec(spec)
    online = not offline and hub_is_reachable()
    if not online and not any(folder.is_dir() for folder in _cache_folders(wanted.name)):
        raise _out_of_reach(wanted, domain=domain, offline=offline)
    return online


def read_hub_documents(spec: str, *, domain: str, seed: int, offline: bool) -> Iterator[str]:
    """Return the documents of a data set, streamed and shuffled by `seed` (shards, then a buffer of
    1000 documents).

    Without network the local cache is used. The hub is probed first, because `datasets` would retry
    for 24 s before failing.

    Raises:
        NotFoundError: no network and not in the cache, or the hub has no such data set.
        DataSourceError: the data set cannot be read or has no text field.
    """
    wanted = parse_hub_spec(spec)
    online = require_hub_dataset(spec, domain=domain, offline=offline)
    rows = _load(wanted, domain=domain, seed=seed, online=online, offline=offline)
    return _texts(rows, wanted)


def _cache_folders(name: str) -> list[Path]:
    """Return the cache folders of this data set in `datasets` and huggingface_hub."""
    cache_home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    home = Path(os.environ.get("HF_HOME", cache_home))
    prepared = Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets"))
    downloaded = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    organisation, _, title = name.partition("/")
    snake_case = re.sub(
        r"([a-z\d])([A-Z])", r"\1_\2", re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", title)
    ).lower()
    folders = [
        prepared / f"{organisation}___{snake_case}",
        downloaded / f"datasets--{organisation}--{title}",
    ]
    return [from_home(folder) for folder in folders]


def why_offline(*, offline: bool) -> str:
    """Return the reason why the hub is not used; `offline`: --offline was given."""
    if offline:
        return "--offline forbids the network"
    if hub_is_forbidden():
        return "HF_HUB_OFFLINE forbids the network"
    return f"{hub_endpoint()} does not answer"


def _out_of_reach(wanted: HubDataset, *, domain: str, offline: bool) -> NotFoundError:
    prepared, downloaded = _cache_folders(wanted.name)
    way_out = "leave out --offline" if offline else "run this once on a machine with network"
    return NotFoundError(
        f"data set '{wanted.name}' (domain '{domain}'): {why_offline(offline=offline)}, it is not"
        f" in the cache ({prepared}, {downloaded}), and no local file or folder has that name",
        hint=f"give a text of your own (--data {domain}=./{domain}.txt) or --data builtin,"
        f" which needs no network; or {way_out}",
    )


def _load(
    wanted: HubDataset, *, domain: str, seed: int, online: bool, offline: bool
) -> "datasets.IterableDataset | datasets.Dataset":
    import datasets
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        if online:
            stream = datasets.load_dataset(
                wanted.name, wanted.config, split=wanted.split, streaming=True
            )
            return stream.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
        with libraries_offline():
            return datasets.load_dataset(wanted.name, wanted.config, split=wanted.split).shuffle(
                seed=seed
            )
    except (
        datasets.exceptions.DatasetsError,
        ValueError,
        RuntimeError,
        OSError,
        HTTPError,
    ) as error:
        if not online:
            raise _out_of_reach(wanted, domain=domain, offline=offline) from error
        message = f"data set '{wanted.name}' (domain '{domain}'): {error}"
        if isinstance(
            error, (FileNotFoundError, ConnectionError, HTTPError)
        ):  # missing, gated, or cut off
            hint = f"check its name at {hub_endpoint()}/datasets; a gated one needs `hf auth login`"
            raise NotFoundError(message, hint=hint) from error
        raise DataSourceError(message, hint="write it as org/name:config:split") from error


def _texts(
    rows: "datasets.IterableDataset | datasets.Dataset", wanted: HubDataset
) -> Iterator[str]:
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        for row in rows:
            text = next((row[name] for name in TEXT_FIELDS if isinstance(row.get(name), str)), None)
            if text is None:
                raise DataSourceError(
                    f"data set '{wanted.name}': no text in the field {' or '.join(TEXT_FIELDS)};"
                    f" fields found: {', '.join(row)}",
                    hint="choose a data set with a text column, or export it to a .jsonl with a"
                    " field 'text'",
                )
            if text.strip():
                yield text
    except (OSError, HTTPError) as error:
        raise DataSourceError(
            f"data set '{wanted.name}': the connection broke ({error})", hint="run it again"
        ) from error


@contextmanager
def libraries_offline() -> Iterator[None]:
    """Keep datasets and huggingface_hub off the network inside this block.

    They read the environment only when imported, so their constants are set.
    """
    import datasets.config
    import huggingface_hub.constants

    before = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE = before
