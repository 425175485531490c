"""Kind of a file or folder that somebody gave, by names and beginnings; nothing is trusted."""

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moe_tool.errors import MoeToolError
from moe_tool.formats.bundle_names import JOURNAL, MANIFEST, PART_SUFFIX
from moe_tool.formats.hostile_file import read_capped
from moe_tool.formats.hostile_hdf5 import opened_hdf5, verified_sha256
from moe_tool.formats.strict_json import parse_json_object

Kind = Literal[
    "bundle",
    "lookup-bundle",
    "half-bundle",
    "headless-bundle",
    "model",
    "folder",
    "empty-folder",
    "profile",
    "run-trace",
    "hdf5",
    "buddies",
    "plan",
    "hardware",
    "bit-prices",
    "manifest",
    "json",
    "gguf",
    "weights",
    "text",
    "empty-file",
    "missing",
    "unknown",
]
KIND_LABELS: dict[Kind, str] = {
    "bundle": "a bundle",
    "lookup-bundle": "a bundle of lookup experts",
    "half-bundle": "a half-written bundle",
    "headless-bundle": "a bundle that lacks its manifest.json",
    "model": "a checkpoint",
    "folder": "a folder of other files",
    "empty-folder": "an empty folder",
    "profile": "a profile",
    "run-trace": "the trace of a run",
    "hdf5": "an HDF5 file",
    "buddies": "a buddy map",
    "plan": "a plan",
    "hardware": "a hardware profile",
    "bit-prices": "a file of bit prices",
    "manifest": "the manifest of a bundle",
    "json": "a JSON file that is not an artifact of moe-tool",
    "gguf": "a GGUF file",
    "weights": "a file of weights",
    "text": "a text file",
    "empty-file": "an empty file",
    "missing": "nothing",
    "unknown": "a file of no known kind",
}
_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
_MAX_HDF5_BYTES = 2**28
"""Largest HDF5 file that is read through to tell a profile from a trace"""
_MAX_JSON_BYTES = 2**26
_BEGINNING_BYTES = 4096
_NAME = re.compile(r"[\w.][\w./-]{0,120}")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
_JSON_KINDS: dict[str, Kind] = {
    "buddies": "buddies",
    "plan": "plan",
    "hardware": "hardware",
    "bit-prices": "bit-prices",
    "bundle": "manifest",
    "lookup-bundle": "manifest",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """Kind of a file or folder, and whose it is."""

    kind: Kind
    model: str | None = None
    """Name of the model that an artifact says it belongs to, if it reads like a name"""

    @property
    def label(self) -> str:
        """The kind in words, with its article"""
        return KIND_LABELS[self.kind]


def kind_of(path: Path) -> Given:
    """Return what lies at a path; what cannot be read is of no known kind."""
    try:
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):
            return _folder_kind(path)
        if not stat.S_ISREG(found.st_mode):
            return Given(kind="unknown")
        if found.st_size == 0:
            return Given(kind="empty-file")
        with path.open("rb") as file:
            beginning = file.read(_BEGINNING_BYTES)
        return _file_kind(path, beginning, size_bytes=found.st_size)
    except (FileNotFoundError, NotADirectoryError):
        return Given(kind="missing")
    except (OSError, MoeToolError):
        return Given(kind="unknown")


def begins_like(path: Path, kind: Literal["hdf5", "json"]) -> bool:
    """Return whether a plain file begins as an HDF5 file, a JSON object or a list does."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            beginning = file.read(_BEGINNING_BYTES)
    except OSError:
        return False
    if kind == "hdf5":
        return beginning.startswith(_HDF5_MAGIC)
    return beginning.lstrip().startswith((b"{", b"["))


def _folder_kind(path: Path) -> Given:
    names = {entry.name for entry in os.scandir(path)}
    if not names:
        return Given(kind="empty-folder")
    if path.name.endswith(PART_SUFFIX) or JOURNAL in names:
        return Given(kind="half-bundle")
    if MANIFEST in names:
        parsed = _json(path / MANIFEST)
        kinds: dict[Any, Kind] = {"bundle": "bundle", "lookup-bundle": "lookup-bundle"}
        if kind := kinds.get(parsed.get("kind")):
            return Given(kind=kind, model=_model_of(parsed.get("identity")))
    if any(name.startswith("skeleton-") for name in names):
        return Given(kind="headless-bundle")
    return Given(kind="model" if "config.json" in names else "folder")


def _file_kind(path: Path, beginning: bytes, *, size_bytes: int) -> Given:
    if beginning.startswith(_HDF5_MAGIC):
        return _hdf5_kind(path, size_bytes=size_bytes)
    if beginning.startswith(b"GGUF"):
        return Given(kind="gguf")
    if path.name.endswith(_WEIGHT_SUFFIXES):
        return Given(kind="weights")
    if beginning.lstrip().startswith(b"{"):
        parsed = _json(path)
        kind = parsed.get("kind")
        if isinstance(kind, str) and kind in _JSON_KINDS:
            return Given(kind=_JSON_KINDS[kind], model=_model_of(parsed.get("identity")))
        if parsed:
            return Given(kind="json")
    return Given(kind="text" if _is_text(beginning) else "unknown")


def _hdf5_kind(path: Path, *, size_bytes: int) -> Given:
    if size_bytes > _MAX_HDF5_BYTES:
        return Given(kind="hdf5")
    try:
        verified_sha256(path, remedy="")
        with opened_hdf5(path, remedy="") as file:
            kind, header = file.attrs.get("kind"), file.attrs.get("header")
    except MoeToolError:
        return Given(kind="hdf5")
    parsed = {}
    if isinstance(header, str):
        parsed = parse_json_object(path, header.encode(), remedy="")
    kinds: dict[Any, Kind] = {"profile": "profile", "run-trace": "run-trace"}
    return Given(kind=kinds.get(kind, "hdf5"), model=_model_of(parsed.get("identity")))


def _json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; nothing if it holds none."""
    try:
        text = read_capped(path, limit_bytes=_MAX_JSON_BYTES, remedy="")
        return parse_json_object(path, text, remedy="")
    except MoeToolError:
        return {}


def _model_of(identity: object) -> str | None:
    name = identity.get("name") if isinstance(identity, dict) else None
    return name if isinstance(name, str) and _NAME.fullmatch(name) else None


def _is_text(beginning: bytes) -> bool:
    try:
        text = beginning.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < _BEGINNING_BYTES - 4:
            return False
        text = beginning[: error.start].decode("utf-8")  # the last character is cut
    return all(letter.isprintable() or letter.isspace() or letter == "\x1b" for letter in text)
