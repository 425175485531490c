"""The rows of `bench` as markdown, csv, json and json lines.

Rows are told by their fields' names alone, so that this file stands below the room that measures.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence

from moe_tool.budget.sizes import format_bytes

Row = Mapping[str, object]
_COLUMNS = (
    "model",
    "size",
    "params",
    "bits",
    "budget",
    "policy",
    "eviction",
    "prefetch",
    "threads",
    "test",
    "tokens/s",
    "hit rate",
    "bytes/token",
    "stall share",
    "peak RSS",
    "cache",
)
_TEXT_COLUMNS = ("model", "bits", "budget", "policy", "eviction", "prefetch", "test", "cache")


def markdown_rows(rows: Sequence[Row]) -> str:
    """Return a table with padded columns, readable as it is and as markdown; its bits are those
    of the experts / of the skeleton."""
    lines = [_COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_COLUMNS))]
    rule = [
        "-" * width if name in _TEXT_COLUMNS else "-" * (width - 1) + ":"
        for name, width in zip(_COLUMNS, widths, strict=True)
    ]
    text = [_line(_COLUMNS, widths), _line(rule, widths)]
    return "\n".join(text + [_line(line, widths) for line in lines[1:]])


def csv_rows(rows: Sequence[Row]) -> str:
    """Return a header and one line per row, every field; lists with a semicolon between entries."""
    stream = io.StringIO()
    if rows:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _csv_cell(value) for name, value in row.items()})
    return stream.getvalue().rstrip("\n")


def json_rows(rows: Sequence[Row]) -> str:
    """Return one array of objects."""
    return json.dumps([dict(row) for row in rows], indent=1, ensure_ascii=False, allow_nan=False)


def json_line(row: Row) -> str:
    """Return one object on one line."""
    return json.dumps(dict(row), ensure_ascii=False, allow_nan=False)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [
        cell.ljust(width) if name in _TEXT_COLUMNS else cell.rjust(width)
        for name, cell, width in zip(_COLUMNS, cells, widths, strict=True)
    ]
    return "| " + " | ".join(padded) + " |"


def _cells(row: Row) -> tuple[str, ...]:
    budget = f"{row['budget']} ({format_bytes(_number(row['budget_bytes']))})"
    rate, spread = _number(row["tokens_per_second"]), _number(row["tokens_per_second_sd"])
    peak = format_bytes(_number(row["peak_rss_bytes"]))
    return (
        str(row["model"]).replace("|", "\\|"),
        format_bytes(_number(row["size_bytes"])),
        _count(_number(row["params"])),
        f"{row['bits']} / {row['skeleton_bits']}",
        budget,
        _policy(row),
        str(row["eviction"]),
        _prefetch(row),
        str(row["threads"]),
        str(row["test"]),
        f"{rate:.2f} ± {spread:.2f}",
        f"{_number(row['hit_rate']):.1%}",
        format_bytes(_number(row["bytes_per_token"])),
        f"{_number(row['stall_share']):.1%}",
        peak if row["peak_rss_of"] == "row" else f"{peak} (process)",
        str(row["cache"]),
    )


def _policy(row: Row) -> str:
    """With the share of channels that is left out beside it, where that was asked for."""
    sparse = row["sparse_experts"]
    return str(row["policy"]) + ("" if sparse is None else f", sparse {_number(sparse):g}")


def _prefetch(row: Row) -> str:
    if not _number(row["prefetches_per_token"]):
        return str(row["prefetch"])
    used = f"{_number(row['prefetch_hit_rate']):.0%} used"
    size = format_bytes(_number(row["prefetched_bytes_per_token"]))
    return f"{row['prefetch']} ({used}, {size}/token)"


def _number(value: object) -> float:
    assert isinstance(value, int | float)
    return value


def _count(number: float) -> str:
    for suffix, factor in (("B", 10**9), ("M", 10**6)):
        if number >= factor:
            return f"{number / factor:.2f} {suffix}"
    return f"{number:.0f}"


def _csv_cell(value: object) -> object:
    return ";".join(map(str, value)) if isinstance(value, list | tuple) else value
