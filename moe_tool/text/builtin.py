"""Built-in text of every Python installation: its language reference and standard library.

Two domains: `docs`, the topics of `pydoc_data.topics`, and `code`, the .py files of the standard
library. A hash of its name assigns each document to one of two parts: about one in eight is held
out (`eval`), the others are for training and calibration (`train`). Topics repeat each other
("compound" contains "for"), so paragraphs of held-out topics are removed from the train part.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Literal

from moe_tool.errors import DataSourceError

BUILTIN_DOMAINS = ("docs", "code")
Part = Literal["train", "eval"]

_HELD_OUT_ONE_IN = 8
# The best of six salts: it holds out nearly an eighth of the characters of both domains.
_HASH_SALT = "moe-tool builtin 5 "
_SHARED_PARAGRAPH_CHARACTERS = 24
# Tests, third-party packages, generated tables, and two applications that ship with Python.
_SKIPPED_FOLDERS = (
    *("test", "tests", "site-packages", "dist-packages", "__pycache__", "encodings"),
    *("ensurepip", "pydoc_data", "idlelib", "lib2to3", "turtledemo"),
)
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "__phello__")
_SKIPPED_FILES = frozenset({"html/entities.py", "stringprep.py"})


def builtin_documents(domain: str, *, part: Part) -> dict[str, str]:
    """Return one domain's texts that belong to `part` by name, sorted: a topic's, or a file's
    path below the standard library.

    Raises:
        DataSourceError: this Python lacks its topics or the sources of its library.
    """
    assert domain in BUILTIN_DOMAINS
    return _topics(part) if domain == "docs" else dict(_library_sources(part))


def is_held_out(name: str) -> bool:
    """Return whether a document is held out; depends on its name only."""
    digest = hashlib.sha256((_HASH_SALT + name).encode()).digest()
    return int.from_bytes(digest[:8], "big") % _HELD_OUT_ONE_IN == 0


def _topics(part: Part) -> dict[str, str]:
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise DataSourceError(
            "built-in domain 'docs': this Python has no pydoc_data.topics",
            hint="use --data builtin:code, or a text of your own: --data docs=./docs.txt",
        ) from error
    held_out = {name: text for name, text in sorted(topics.items()) if is_held_out(name)}
    if part == "eval":
        return held_out
    secret = {
        paragraph.strip()
        for text in held_out.values()
        for paragraph in text.split("\n\n")
        if len(paragraph.strip()) >= _SHARED_PARAGRAPH_CHARACTERS
    }
    train = {}
    for name in sorted(topics.keys() - held_out.keys()):
        kept = [part for part in topics[name].split("\n\n") if part.strip() not in secret]
        if any(map(str.strip, kept)):
            train[name] = "\n\n".join(kept)
    return train


def _library_sources(part: Part) -> Iterator[tuple[str, str]]:
    library = Path(sysconfig.get_path("stdlib"))
    names = sorted(_library_source_names(library))
    if not names:
        raise DataSourceError(
            f"built-in domain 'code': no .py files of the standard library in {library}",
            hint="use --data builtin:docs, or sources of your own: --data code=./src",
        )
    for name in names:
        if is_held_out(name) != (part == "eval"):
            continue
        try:
            text = (library / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataSourceError(
                f"built-in domain 'code': cannot read {library / name}: {error}"
            ) from error
        if text.strip():
            yield name, text


def _library_source_names(library: Path) -> Iterator[str]:
    for folder, subfolders, files in os.walk(library):
        subfolders[:] = [
            name
            for name in subfolders
            if name not in _SKIPPED_FOLDERS and not name.startswith(_SKIPPED_PREFIXES)
        ]
        for file in files:
            name = (Path(folder) / file).relative_to(library).as_posix()
            if (
                file.endswith(".py")
                and not file.startswith(_SKIPPED_PREFIXES)
                and name not in _SKIPPED_FILES
            ):
                yield name
