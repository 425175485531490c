"""Rows of `bench` as markdown, csv, json and json lines."""

import csv
import io
import json
from collections.abc import Mapping, Sequence

from moe_tool.artifacts.bench_report import BenchRow
from moe_tool.artifacts.json_fields import json_fields
from moe_tool.artifacts.run_stats import PhaseCounters
from moe_tool.budget.sizes import format_bytes

_TEXT_COLUMNS = ("model", "bits", "budget", "policy", "eviction", "prefetch", "test", "cache")


def markdown_rows(rows: Sequence[BenchRow]) -> str:
    """Return a markdown table with padded columns; bits are those of experts / skeleton."""
    found = [_cells(row) for row in rows]
    names = list(found[0])
    widths = {name: max(len(name), *(len(cells[name]) for cells in found)) for name in names}
    rule = {
        name: "-" * width if name in _TEXT_COLUMNS else "-" * (width - 1) + ":"
        for name, width in widths.items()
    }
    lines = (dict(zip(names, names, strict=True)), rule, *found)
    return "\n".join(_line(cells, widths) for cells in lines)


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


def _line(cells: Mapping[str, str], widths: Mapping[str, int]) -> str:
    padded = [
        cell.ljust(widths[name]) if name in _TEXT_COLUMNS else cell.rjust(widths[name])
        for name, cell in cells.items()
    ]
    return "| " + " | ".join(padded) + " |"


def _cells(row: BenchRow) -> dict[str, str]:
    bundle, setup, timed = row.bundle, row.setup, row.timed
    peak = format_bytes(row.peak_rss_bytes)
    sparse = "" if setup.sparse_experts is None else f", sparse {setup.sparse_experts:g}"
    return {
        "model": bundle.model.replace("|", "\\|"),
        "size": format_bytes(bundle.size_bytes),
        "params": _count(bundle.params),
        "bits": f"{bundle.bits} / {bundle.skeleton_bits}",
        "budget": f"{row.budget} ({format_bytes(setup.memory_budget_bytes)})",
        "policy": setup.policy + sparse,
        "eviction": setup.eviction,
        "prefetch": setup.prefetch + _prefetched(timed),
        "threads": str(setup.threads),
        "test": row.test,
        "tokens/s": f"{row.tokens_per_second:.2f} ± {row.tokens_per_second_sd:.2f}",
        "hit rate": f"{timed.hit_rate:.1%}",
        "bytes/token": format_bytes(timed.bytes_read_per_token),
        "stall share": f"{row.stall_share:.1%}",
        "peak RSS": peak if row.peak_rss_of == "row" else f"{peak} (process)",
        "cache": row.cache,
    }


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
