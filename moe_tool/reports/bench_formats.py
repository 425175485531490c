"""Rows of `bench` as markdown, csv, json and json lines."""

import csv
import io
import json
from collections.abc import Sequence

from moe_tool.artifacts.bench_report import BenchRow
from moe_tool.artifacts.json_fields import json_fields
from moe_tool.artifacts.run_stats import PhaseCounters
from moe_tool.budget.sizes import format_bytes

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


def markdown_rows(rows: Sequence[BenchRow]) -> str:
    """Return a markdown table with padded columns; bits are those of experts / skeleton."""
    lines = [_COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_COLUMNS))]
    rule = [
        "-" * width if name in _TEXT_COLUMNS else "-" * (width - 1) + ":"
        for name, width in zip(_COLUMNS, widths, strict=True)
    ]
    text = [_line(_COLUMNS, widths), _line(rule, widths)]
    return "\n".join(text + [_line(line, widths) for line in lines[1:]])


def csv_rows(rows: Sequence[BenchRow]) -> str:
    """Return a header and one line per row, every field; lists with a semicolon between entries."""
    stream = io.StringIO()
    objects = json_fields(rows)
    if objects:
        writer = csv.DictWriter(stream, fieldnames=list(objects[0]), lineterminator="\n")
        writer.writeheader()
        for row in objects:
            writer.writerow({name: _csv_cell(value) for name, value in row.items()})
    return stream.getvalue().rstrip("\n")


def json_rows(rows: Sequence[BenchRow]) -> str:
    """Return one array of objects."""
    return json.dumps(json_fields(rows), indent=1, ensure_ascii=False, allow_nan=False)


def json_line(row: BenchRow) -> str:
    """Return one object on one line."""
    return json.dumps(json_fields(row), ensure_ascii=False, allow_nan=False)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [
        cell.ljust(width) if name in _TEXT_COLUMNS else cell.rjust(width)
        for name, cell, width in zip(_COLUMNS, cells, widths, strict=True)
    ]
    return "| " + " | ".join(padded) + " |"


def _cells(row: BenchRow) -> tuple[str, ...]:
    bundle, setup, timed = row.bundle, row.setup, row.timed
    peak = format_bytes(row.peak_rss_bytes)
    sparse = "" if setup.sparse_experts is None else f", sparse {setup.sparse_experts:g}"
    return (
        bundle.model.replace("|", "\\|"),
        format_bytes(bundle.size_bytes),
        _count(bundle.params),
        f"{bundle.bits} / {bundle.skeleton_bits}",
        f"{row.budget} ({format_bytes(setup.memory_budget_bytes)})",
        setup.policy + sparse,
        setup.eviction,
        setup.prefetch + _prefetched(timed),
        str(setup.threads),
        row.test,
        f"{row.tokens_per_second:.2f} ± {row.tokens_per_second_sd:.2f}",
        f"{timed.hit_rate:.1%}",
        format_bytes(timed.bytes_read_per_token),
        f"{row.stall_share:.1%}",
        peak if row.peak_rss_of == "row" else f"{peak} (process)",
        row.cache,
    )


def _prefetched(timed: PhaseCounters) -> str:
    if not timed.prefetches:
        return ""
    size = format_bytes(timed.prefetched_bytes / timed.tokens)
    return f" ({timed.prefetch_hit_rate:.0%} used, {size}/token)"


def _count(number: float) -> str:
    for suffix, factor in (("B", 10**9), ("M", 10**6)):
        if number >= factor:
            return f"{number / factor:.2f} {suffix}"
    return f"{number:.0f}"


def _csv_cell(value: object) -> object:
    return ";".join(map(str, value)) if isinstance(value, list | tuple) else value
