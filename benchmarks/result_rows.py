"""What a benchmark found: raw rows in a file of JSON lines, a table for people."""

import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from machine import describe_machine, warn_if_busy


class RowFile:
    """Rows of raw figures, each written as it comes so that an interruption loses none."""

    def __init__(self, file: TextIO | None) -> None:
        self._file = file

    def add(self, kind: str, **fields: Any) -> None:
        """Append one row; without a file do nothing."""
        if self._file is not None:
            self._file.write(json.dumps({"kind": kind, **fields}) + "\n")
            self._file.flush()


@contextmanager
def record_rows(out: Path | None, arguments: dict[str, Any]) -> Iterator[RowFile]:
    """Yield where rows go; the machine and its load are recorded and printed before and after.

    Args:
        out: appended to; None: rows are not kept.
        arguments: of the command line, recorded with the machine.
    """
    before = describe_machine()
    warn_if_busy(before)
    file = None if out is None else out.open("a")
    try:
        rows = RowFile(file)
        rows.add("before", **before.to_row(), arguments={k: str(v) for k, v in arguments.items()})
        yield rows
        after = describe_machine()
        rows.add("after", **after.to_row())
    finally:
        if file is not None:
            file.close()
    print(before)
    print(f"load average {before.load_average:.2f} before, {after.load_average:.2f} after (ours)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Several measurements of one thing."""

    median: float
    lowest: float
    highest: float

    def __str__(self) -> str:
        return f"{self.median:.3g} [{self.lowest:.3g}-{self.highest:.3g}]"


def spread_of(values: Sequence[float]) -> Spread:
    """Return median and extremes of at least one value."""
    return Spread(median=statistics.median(values), lowest=min(values), highest=max(values))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table in Markdown, its columns aligned."""
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]
    for line in (header, ["-" * width for width in widths], *rows):
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("| " + " | ".join(cells) + " |")
