"""Records of a bundle that stay in the files of its checkpoint: which bytes of which file."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, model_validator

from moe_tool.artifacts.form_table import Basename, SizeBytes
from moe_tool.artifacts.identity import HexDigest
from moe_tool.artifacts.schema import FrozenModel

MAX_SPREAD_BYTES = 2**20
"""Most bytes of a part that does not lie in the record as it does on disk"""
WIDENED = 0
PLACED_KINDS = frozenset({"native", "kept"})
"""Kinds of precisions that a checkpoint's own files can hold"""
_NUMBER = r"\d{1,16}"
_PART = rf"{_NUMBER}( {_NUMBER}){{2,3}}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A range of a file, and what it becomes in a record."""

    file: int
    """Position among the source files"""
    offset: int
    size_bytes: int
    times: int = 1
    """Copies of the range one after the other; WIDENED: bfloat16 numbers become float32"""

    @property
    def filled_bytes(self) -> int:
        """Bytes of the record that the part fills"""
        return self.size_bytes * (2 if self.times == WIDENED else self.times)


def parts_text(parts: Iterable[Part]) -> str:
    """Return parts as a manifest has them: `FILE OFFSET SIZE`, and ` TIMES` unless once."""
    return ",".join(
        f"{each.file} {each.offset} {each.size_bytes}"
        + ("" if each.times == 1 else f" {each.times}")
        for each in parts
    )


def parse_parts(text: str) -> tuple[Part, ...]:
    """Return the parts of one record."""
    fields = [list(map(int, part.split())) for part in text.split(",")]
    return tuple(
        Part(file=file, offset=offset, size_bytes=size, times=rest[0] if rest else 1)
        for file, offset, size, *rest in fields
    )


PartsText = Annotated[str, Field(pattern=rf"^{_PART}(,{_PART})*$", max_length=2**16)]


class SourceFile(FrozenModel):
    """One file of the checkpoint."""

    name: Basename
    size_bytes: SizeBytes
    header_bytes: Annotated[int, Field(ge=1, le=2**28)]
    """Bytes before the first tensor"""
    header_sha256: HexDigest
    """Hash of these bytes, checked when the bundle is opened"""


class PlacedTable(FrozenModel):
    """Parts of the records of one table."""

    form: Annotated[int, Field(ge=0, lt=64)]
    """Position among the tables of the manifest"""
    parts: tuple[PartsText, ...]
    """Parts of each record, in the table's order; they fill the segments one after the other"""


class SourceFiles(FrozenModel):
    """Section `source-files`: the listed files of these tables are not written; a record's bytes,
    and so its hash, are what they would be there."""

    folder: Annotated[str, Field(min_length=1, max_length=4096)]
    """The checkpoint's folder as the user named it"""
    resolved: Annotated[str, Field(pattern=r"^/", max_length=4096)]
    """Absolute path of that folder, links resolved"""
    files: Annotated[tuple[SourceFile, ...], Field(min_length=1, max_length=2**16)]
    tables: Annotated[tuple[PlacedTable, ...], Field(min_length=1, max_length=64)]

    @model_validator(mode="after")
    def _consistent(self) -> "SourceFiles":
        if len({file.name for file in self.files}) < len(self.files):
            raise ValueError("a source file is listed twice")
        if len({table.form for table in self.tables}) < len(self.tables):
            raise ValueError("a table is placed twice")
        for table in self.tables:
            for text in table.parts:
                for part in parse_parts(text):
                    self._check(part)
        return self

    def _check(self, part: Part) -> None:
        if part.file >= len(self.files):
            raise ValueError(f"a part lies in file {part.file}, {len(self.files)} are listed")
        file = self.files[part.file]
        if part.size_bytes < 1 or part.offset < file.header_bytes:
            raise ValueError(f"a part of {file.name} is empty, or begins in the header")
        if part.offset + part.size_bytes > file.size_bytes:
            raise ValueError(f"a part ends beyond {file.name}")
        if part.times != 1 and part.size_bytes > MAX_SPREAD_BYTES:
            raise ValueError(f"a part of {file.name} is too large to be repeated or widened")
        if part.times == WIDENED and part.size_bytes % 2:
            raise ValueError(f"a part of {file.name} holds no numbers of two bytes")
