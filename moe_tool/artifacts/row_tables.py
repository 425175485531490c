"""Embedding tables of a bundle whose rows can be read one by one, with hashes of their blocks."""

import math
from collections.abc import Iterable
from typing import Annotated

from pydantic import Field, model_validator

from moe_tool.artifacts.form_table import SizeBytes
from moe_tool.artifacts.schema import FrozenModel

LEAST_BLOCK_BYTES = 2**16
MOST_BLOCK_BYTES = 2**24
_MOST_BLOCKS = 2**18
_DIGITS = 16


def block_bytes_of(table_bytes: int) -> int:
    """Return the size of the blocks that a table of this size is hashed in: 64 KiB, or more if the
    hashes would be more than 2^18."""
    least = max(LEAST_BLOCK_BYTES, math.ceil(table_bytes / _MOST_BLOCKS))
    return min(MOST_BLOCK_BYTES, 1 << (least - 1).bit_length())


class HashedBlocks(FrozenModel):
    """Hashes of the blocks of one tensor, so that a part of it can be checked by itself."""

    block_bytes: Annotated[int, Field(ge=4096, le=MOST_BLOCK_BYTES)]
    """Size of each block but the last"""
    xxh3: Annotated[str, Field(pattern=r"^([0-9a-f]{16})+$", max_length=2**26)]
    """The xxh3-64 of each block, one behind the other"""

    @property
    def hashes(self) -> list[str]:
        """Hash of each block"""
        return [self.xxh3[at : at + _DIGITS] for at in range(0, len(self.xxh3), _DIGITS)]

    @property
    def n_blocks(self) -> int:
        """Number of hashed blocks"""
        return len(self.xxh3) // _DIGITS


class RowTablePart(HashedBlocks):
    """One tensor of the skeleton that holds rows of a table, or all of them."""

    tensor: Annotated[str, Field(min_length=1, max_length=1024)]
    parameter: Annotated[str, Field(min_length=1, max_length=512)]
    """Table in transformers' model"""
    held_bytes: SizeBytes
    """Bytes in memory if it is loaded"""


class RowTables(FrozenModel):
    """Section `row-tables`: what a run leaves on disk by default, and how its reads are checked."""

    rows: Annotated[str, Field(pattern=r"^(auto|none|[0-9]{1,16})$")]
    """Request of `pack --rows`: auto, none, or the least bytes of a table that stays on disk"""
    parts: Annotated[tuple[RowTablePart, ...], Field(max_length=2**16)]

    @model_validator(mode="after")
    def _consistent(self) -> "RowTables":
        if len({part.tensor for part in self.parts}) < len(self.parts):
            raise ValueError("a table is listed twice")
        return self


def table_bytes(parts: Iterable[RowTablePart]) -> dict[str, int]:
    """Return the bytes in memory of each table, by parameter."""
    found: dict[str, int] = {}
    for part in parts:
        found[part.parameter] = found.get(part.parameter, 0) + part.held_bytes
    return found
