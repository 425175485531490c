"""How an input gets damaged, and what has to be said about it."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py

from moe_tool.errors import CorruptArtifactError, MoeToolError

Damage = Callable[[Path], None]
"""Damages the file at a path, or the folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One damaged input."""

    name: str
    damage: Damage
    says: str
    """Words of the message; the name of the damaged file is among them"""
    error: type[MoeToolError] = CorruptArtifactError


def in_file(name: str, damage: Damage) -> Damage:
    """Damage one file of a folder."""
    return lambda folder: damage(folder / name)


def cut(n_bytes: int) -> Damage:
    """Keep the first bytes; of a negative number: all but the last."""
    return lambda path: _write(path, path.read_bytes()[:n_bytes])


def append(data: bytes) -> Damage:
    """Add bytes at the end."""
    return lambda path: _write(path, path.read_bytes() + data)


def content(data: bytes) -> Damage:
    """Replace everything."""
    return lambda path: _write(path, data)


def flip(position: int) -> Damage:
    """Flip one bit."""

    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[position] ^= 1
        _write(path, bytes(data))

    return damage


def replaced(old: bytes, new: bytes) -> Damage:
    """Replace some bytes that are there."""

    def damage(path: Path) -> None:
        data = path.read_bytes()
        assert old in data
        _write(path, data.replace(old, new, 1))

    return damage


def removed(path: Path) -> None:
    """Delete the file."""
    path.unlink()


def folder_instead(path: Path) -> None:
    """A folder of that name."""
    path.unlink()
    path.mkdir()


def linked(path: Path) -> None:
    """A link to the same bytes elsewhere."""
    elsewhere = path.parent.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def pipe_instead(path: Path) -> None:
    """A pipe of that name: who opens it carelessly waits for ever."""
    import os

    path.unlink()
    os.mkfifo(path)


def json_changed(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change a JSON object, which stays JSON."""

    def damage(path: Path) -> None:
        parsed = json.loads(path.read_bytes())
        parsed.pop("sha256", None)  # a forgery, not an accident
        change(parsed)
        path.write_text(json.dumps(parsed))

    return damage


def header_changed(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change a safetensors header; the data stay."""

    def damage(path: Path) -> None:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        parsed = json.loads(data[8 : 8 + length])
        change(parsed)
        text = json.dumps(parsed).encode()
        _write(path, len(text).to_bytes(8, "little") + text + data[8 + length :])

    return damage


def raw_header(text: bytes) -> Damage:
    """Put another text into a safetensors header."""

    def damage(path: Path) -> None:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        _write(path, len(text).to_bytes(8, "little") + text + data[8 + length :])

    return damage


def hdf5_changed(change: Callable[[h5py.File], object]) -> Damage:
    """Change an HDF5 file and seal it again: a forgery, not an accident."""

    def damage(path: Path) -> None:
        _write(path, path.read_bytes()[:-32])
        with h5py.File(path, "r+", libver=("v110", "v110")) as file:
            change(file)
        sealed(path)

    return damage


def sealed(path: Path) -> None:
    """Seal whatever is there."""
    data = path.read_bytes()
    _write(path, data + hashlib.sha256(data).digest())


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
