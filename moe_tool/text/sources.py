"""Text sources of `--data`: parsing of their names, reading of their documents."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_tool.errors import NotFoundError, UsageError
from moe_tool.formats.home_folder import from_home
from moe_tool.formats.wrong_kind import require_kind
from moe_tool.text.builtin import BUILTIN_DOMAINS, Part, builtin_documents
from moe_tool.text.hub_datasets import read_hub_documents, require_hub_dataset
from moe_tool.text.local_files import SUPPORTED_SUFFIXES, read_local_documents
from moe_tool.text.text_blocks import interleave_blocks, split_text

HUB_ALIASES = {
    "wikitext": "Salesforce/wikitext:wikitext-2-raw-v1:train",
    "wikitext-103": "Salesforce/wikitext:wikitext-103-raw-v1:train",
    "wikipedia": "wikimedia/wikipedia:20231101.en:train",
    "c4": "allenai/c4:en:train",
    "fineweb": "HuggingFaceFW/fineweb:sample-10BT:train",
}

_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]*)=(.+)", re.DOTALL)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+){0,2}")
_WAYS_TO_NAME_TEXT = (
    "use builtin, a file or folder (wiki=./wiki.txt), an alias ("
    + ", ".join(HUB_ALIASES)
    + ") or a hub id (org/name[:config][:split])"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSource:
    """Source of one domain's text."""

    domain: str
    """Name of the domain, unique among the sources of a command."""
    spec: str
    """Location: `builtin:DOMAIN[:eval]`, a path, or `org/name[:config][:split]`."""


def parse_sources(arguments: Sequence[str]) -> tuple[TextSource, ...]:
    """Return the sources of --data arguments, in order, without opening them.

    Each argument is `[NAME=]SOURCE`. The default name of a domain is that of the file, folder,
    alias or data set. `builtin` means two domains, `docs` and `code`; `builtin:eval` their held-out
    parts, `builtin:docs[:eval]` one of them.

    Raises:
        UsageError: there is no argument, one is invalid, or two domains have the same name.
    """
    sources = [source for argument in arguments for source in _parse_argument(argument)]
    if not sources:
        raise UsageError("no text source is given", hint=_WAYS_TO_NAME_TEXT)
    seen: dict[str, str] = {}
    for source in sources:
        if source.domain in seen:
            raise UsageError(
                f"two text sources are called '{source.domain}':"
                f" {seen[source.domain]} and {source.spec}",
                hint=f"name them apart: {source.domain}2={source.spec}",
            )
        seen[source.domain] = source.spec
    return tuple(sources)


def require_sources(sources: Sequence[TextSource], *, offline: bool = False) -> None:
    """Refuse missing sources before slow work begins.

    Raises:
        NotFoundError: a file or folder does not exist, or the hub cannot be reached.
    """
    for source in sources:
        if source.spec.partition(":")[0] == "builtin":
            continue
        if not _is_local(source.spec):
            require_hub_dataset(source.spec, domain=source.domain, offline=offline)
        elif not (path := from_home(source.spec)).exists():
            raise NotFoundError(
                f"{path} does not exist", hint=f"check the path; {_WAYS_TO_NAME_TEXT}"
            )


def read_documents(source: TextSource, *, seed: int, offline: bool = False) -> Iterator[str]:
    """Return the non-empty documents of a source, in an order set by `seed` and the source alone.

    Long texts are cut into blocks of about 8 kB, so that a small sample has many documents. Reading
    is lazy and in bounded memory, but a missing or empty source is refused at once.

    Args:
        offline: read data sets of the hub from the local cache only.

    Raises:
        NotFoundError: there is no such file, or the hub cannot be reached.
        DataSourceError: it has no readable text (also while iterating, at a damaged place).
    """
    kind, _, rest = source.spec.partition(":")
    if kind == "builtin":
        return _read_builtin(rest, seed=seed)
    if _is_local(source.spec):
        path = from_home(source.spec)
        require_kind(path, "text")
        return read_local_documents(path, seed=seed)
    return read_hub_documents(source.spec, domain=source.domain, seed=seed, offline=offline)


def _parse_argument(argument: str) -> list[TextSource]:
    match = _NAMED.fullmatch(argument.strip())
    name, spec = (match[1], match[2].strip()) if match else (None, argument.strip())
    if spec.partition(":")[0] == "builtin":
        return _parse_builtin(name, spec)
    if spec in HUB_ALIASES:
        return [TextSource(domain=name or spec, spec=HUB_ALIASES[spec])]
    if _is_local(spec):
        path = from_home(spec)
        return [TextSource(domain=name or Path(os.path.abspath(path)).stem, spec=spec)]
    if _HUB_ID.fullmatch(spec):
        return [TextSource(domain=name or spec.split(":")[0].split("/")[1], spec=spec)]
    raise UsageError(
        f"'{argument}' is no text source: no such file or folder, and no known alias",
        hint=_WAYS_TO_NAME_TEXT,
    )


def _parse_builtin(name: str | None, spec: str) -> list[TextSource]:
    words = spec.split(":")[1:]
    part = words.pop() if words and words[-1] == "eval" else None
    domains = tuple(words) or BUILTIN_DOMAINS
    if len(words) > 1 or not set(domains) <= set(BUILTIN_DOMAINS):
        raise UsageError(
            f"'{spec}' is no built-in text",
            hint="write builtin, builtin:eval, builtin:docs, builtin:code or builtin:docs:eval",
        )
    if name is not None and len(domains) > 1:
        raise UsageError(
            f"'{spec}' is two domains and cannot take the one name '{name}'",
            hint=f"name one of them: --data {name}=builtin:{domains[0]}{':eval' if part else ''}",
        )
    suffix = f":{part}" if part else ""
    return [
        TextSource(domain=name or domain, spec=f"builtin:{domain}{suffix}") for domain in domains
    ]


def _is_local(spec: str) -> bool:
    """Return whether a spec is a path: it looks like one, or exists."""
    if not spec or "\0" in spec:
        return False
    return (
        spec.startswith((".", "~", os.sep))
        or spec.endswith(os.sep)
        or Path(spec).suffix.lower() in SUPPORTED_SUFFIXES
        or Path(spec).exists()
    )


def _read_builtin(which: str, *, seed: int) -> Iterator[str]:
    domain, _, part_word = which.partition(":")
    part: Part = "eval" if part_word == "eval" else "train"
    blocks = [split_text(text) for text in builtin_documents(domain, part=part).values()]
    order = interleave_blocks([len(pieces) for pieces in blocks], rng=np.random.default_rng(seed))
    return (blocks[item][block] for item, block in order)
