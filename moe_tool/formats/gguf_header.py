"""Headers of GGUF files read as hostile input: metadata, and place and type of every tensor."""

import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from moe_tool.errors import CorruptArtifactError, UnsupportedModelError
from moe_tool.formats.foreign_files import BEGINNING_BYTES, foreign_content
from moe_tool.formats.hostile_file import open_plain_file, quoted, reading

_MAGIC = b"GGUF"
_AGAIN = "copy or download the file again"
_MAX_HEADER_BYTES = 100_000_000
_MAX_TEXT_BYTES = 2**24
_MAX_ALIGNMENT = 2**20
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
"""Letter of struct by the number of a metadata type"""
_TEXT, _ARRAY = 8, 9
BLOCKS = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    6: ("Q5_0", 32, 22),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
    39: ("MXFP4", 32, 17),
}
"""Name, weights and bytes of a block by the number of a tensor type that is read"""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """Place, type and shape of one tensor."""

    name: str
    kind: str
    """Type by its name: F32, Q4_K, ..."""
    shape: tuple[int, ...]
    """Extents, the one whose numbers lie next to each other last"""
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """Content of a header that was checked."""

    metadata: Mapping[str, Any]
    """Numbers and texts by key; arrays, as the tokenizer's, are left out"""
    tensors: Sequence[GgufTensor]


def read_gguf(path: Path) -> GgufHeader:
    """Return metadata and tensors of a GGUF file.

    Raises:
        NotFoundError: there is no such file.
        CorruptArtifactError: it is no GGUF file, truncated, or its header contradicts itself.
        UnsupportedModelError: its version or the type of a tensor is not read.
        StorageError: it cannot be read.
    """
    with reading(path), open_plain_file(path, remedy=_AGAIN) as file:
        beginning = file.read(BEGINNING_BYTES)
        if not beginning.startswith(_MAGIC):
            raise foreign_content(path, beginning) or CorruptArtifactError(
                f"{path} is no GGUF file", hint=_AGAIN
            )
        file.seek(len(_MAGIC))
        return _Reader(path, file).header()


class _Reader:
    """Position in a header; every step is checked against the size of the file."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file, self._at = path, file, len(_MAGIC)
        self._file_bytes = os.fstat(file.fileno()).st_size

    def header(self) -> GgufHeader:
        version, n_tensors, n_keys = self._number("I"), self._number("Q"), self._number("Q")
        if version not in (2, 3):
            raise UnsupportedModelError(
                f"{self._path} is GGUF of version {version}, which is not read",
                hint="use a file of version 2 or 3, with the lowest bytes of numbers first",
            )
        metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self._text()
            if key in metadata:
                raise self._refused(f"has the key {quoted(key)} twice")
            metadata[key] = self._value()
        listed = [self._tensor() for _ in range(n_tensors)]
        if len({tensor.name for tensor in listed}) != len(listed):
            raise self._refused("has two tensors of one name")
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= _MAX_ALIGNMENT:
            raise self._refused(f"aligns tensors to {quoted(alignment)}")
        return GgufHeader(metadata=metadata, tensors=self._placed(listed, alignment))

    def _refused(self, reason: str) -> CorruptArtifactError:
        return CorruptArtifactError(f"{self._path} {reason}", hint=_AGAIN)

    def _take(self, n_bytes: int) -> bytes:
        self._skip(n_bytes)
        data = self._file.read(n_bytes)
        if len(data) < n_bytes:
            raise self._refused("is truncated: it ends in its header")
        return data

    def _skip(self, n_bytes: int) -> None:
        """Count bytes that are read or passed over."""
        self._at += n_bytes
        if self._at > min(self._file_bytes, _MAX_HEADER_BYTES):
            raise self._refused(
                f"is truncated or no GGUF file: its header goes beyond {self._at - n_bytes} bytes"
            )

    def _number(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self._take(struct.calcsize(f"<{letter}")))[0]

    def _text(self) -> str:
        n_bytes = self._number("Q")
        if n_bytes > _MAX_TEXT_BYTES:
            raise self._refused(f"has a text of {n_bytes} bytes in its header")
        return self._take(n_bytes).decode("utf-8", errors="backslashreplace")

    def _value(self) -> Any:
        kind = self._number("I")
        if kind == _TEXT:
            return self._text()
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        of, count = (self._number("I"), self._number("Q")) if kind == _ARRAY else (kind, 0)
        if of == _TEXT:
            for _ in range(count):
                self._text()
        elif of in _SCALARS:
            n_bytes = count * struct.calcsize(f"<{_SCALARS[of]}")
            self._skip(n_bytes)
            self._file.seek(n_bytes, os.SEEK_CUR)
        else:
            raise self._refused(f"has metadata of the unknown type {of}")
        return None

    def _tensor(self) -> GgufTensor:
        name, n_extents = self._text(), self._number("I")
        if not 1 <= n_extents <= 4:
            raise self._refused(f"has {n_extents} extents for tensor {quoted(name)}")
        shape = tuple(reversed([self._number("Q") for _ in range(n_extents)]))
        kind, offset = self._number("I"), self._number("Q")
        if kind not in BLOCKS:
            raise UnsupportedModelError(
                f"{self._path} holds tensor {quoted(name)} in GGUF type {kind}, which is not read",
                hint="use a file of types " + ", ".join(sorted(b[0] for b in BLOCKS.values())),
            )
        called, n_weights, n_bytes = BLOCKS[kind]
        if 0 in shape or math.prod(shape) >= 2**56 or shape[-1] % n_weights:
            raise self._refused(f"has shape {list(shape)} for {called} tensor {quoted(name)}")
        size = math.prod(shape) // n_weights * n_bytes
        return GgufTensor(name=name, kind=called, shape=shape, offset=offset, size_bytes=size)

    def _placed(self, tensors: list[GgufTensor], alignment: int) -> list[GgufTensor]:
        """Return tensors with offsets in the file; refuse holes, overlaps and what lies beyond."""
        start = position = -(-self._at // alignment) * alignment
        for tensor in sorted(tensors, key=lambda t: t.offset):
            if start + tensor.offset != position:
                raise self._refused(f"has tensor {quoted(tensor.name)} behind a hole or in another")
            end = position + tensor.size_bytes
            position = -(-end // alignment) * alignment
            if end > self._file_bytes:
                raise self._refused(
                    f"is truncated: tensor {quoted(tensor.name)} ends at {end} bytes, "
                    f"the file at {self._file_bytes}"
                )
        if self._file_bytes > position:
            raise self._refused(f"is longer than its {position} bytes")
        return [replace(tensor, offset=start + tensor.offset) for tensor in tensors]
