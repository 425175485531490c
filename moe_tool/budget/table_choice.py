"""Choice of the embedding tables that stay on disk in a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from moe_tool.budget.sizes import format_bytes, parse_bytes
from moe_tool.errors import UsageError

_LEAST_BYTES = 64 * 2**20
"""Smallest table that stays on disk by itself: less is not worth the reads"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsRequest:
    """Request for the tables of which only rows are read."""

    kind: Literal["auto", "bytes", "none"]
    least_bytes: int = _LEAST_BYTES
    """Size in memory of the smallest such table"""

    @property
    def word(self) -> str:
        """The request as `parse_rows` takes it"""
        return str(self.least_bytes) if self.kind == "bytes" else self.kind

    @property
    def is_forced(self) -> bool:
        """Whether the tables stay on disk even if there is memory for everything."""
        return self.kind == "bytes"

    def choose(self, tables: Mapping[str, int]) -> tuple[str, ...]:
        """Return the tables that may stay on disk, of table -> bytes in memory."""
        if self.kind == "none":
            return ()
        return tuple(name for name, size in tables.items() if size >= self.least_bytes)


AUTO_ROWS = RowsRequest(kind="auto")


def parse_rows(text: str) -> RowsRequest:
    """Return the request for "auto", "none" or "64MiB".

    Raises:
        UsageError: the text is none of these.
    """
    word = text.strip().lower()
    if word == "auto":
        return AUTO_ROWS
    if word == "none":
        return RowsRequest(kind="none")
    try:
        return RowsRequest(kind="bytes", least_bytes=parse_bytes(text))
    except UsageError as error:
        raise UsageError(f"--rows {text}", hint="write auto, none, or a size as 64MiB") from error


def describe_tables(sizes: Mapping[str, int]) -> str:
    """Return the note on tables on disk, of table -> bytes in memory."""
    what = "1 embedding table stays" if len(sizes) == 1 else f"{len(sizes)} embedding tables stay"
    return (
        f"{what} on disk ({format_bytes(sum(sizes.values()))}): rows are read as tokens need them"
    )
