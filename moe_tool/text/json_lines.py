"""Documents from a .jsonl file: a JSON object per line, its text in `text` or `content`."""

import json
from collections.abc import Iterator
from pathlib import Path

from moe_tool.errors import DataSourceError
from moe_tool.text import TEXT_FIELDS

_ONE_STRING = (
    "write each text as one string into a field 'text'; turns of a chat are joined first, "
    "e.g. by the tokenizer's chat template"
)
_BLOCK_BYTES = 65536
_MAX_LINE_BYTES = 64 * 2**20


def count_line_blocks(size_bytes: int) -> int:
    """Return the number of blocks in a file of `size_bytes` bytes."""
    return -(-size_bytes // _BLOCK_BYTES)


def read_line_block(file: Path, block: int) -> Iterator[str]:
    """Yield the texts of the lines that begin in bytes [block, block + 1) * 65536; blank lines are
    skipped, and a null text is empty.

    Raises:
        DataSourceError: a line is not a JSON object, has no text field, or is longer than 64 MiB;
            the message names file and line.
    """
    end = (block + 1) * _BLOCK_BYTES
    with file.open("rb") as stream:
        if block > 0:
            stream.seek(block * _BLOCK_BYTES - 1)
            if not stream.readline(_BLOCK_BYTES + 1).endswith(b"\n"):
                return  # a line from an earlier block covers all of this one
        while (start := stream.tell()) < end:
            line = stream.readline(_MAX_LINE_BYTES)
            if not line:
                return
            if line.strip():
                yield _text_of_line(file, line, start)


def _text_of_line(file: Path, line: bytes, start: int) -> str:
    if len(line) == _MAX_LINE_BYTES:
        raise DataSourceError(
            f"{_place(file, start)}: the line is longer than 64 MiB", hint="is this a .jsonl file?"
        )
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON or bad UTF-8
        raise DataSourceError(
            f"{_place(file, start)}: not JSON ({error})", hint="each line has to be one JSON object"
        ) from error
    if not isinstance(row, dict):
        raise DataSourceError(
            f"{_place(file, start)}: wanted a JSON object, found a {type(row).__name__}"
        )
    for field in TEXT_FIELDS:
        if isinstance(row.get(field), str):
            return str(row[field])
    named = [field for field in TEXT_FIELDS if field in row]
    if any(row[field] is None for field in named):
        return ""  # as an empty row of a table
    if named:
        raise DataSourceError(
            f"{_place(file, start)}: the field {named[0]} holds a {type(row[named[0]]).__name__}, "
            "not text",
            hint=_ONE_STRING,
        )
    has_none = bool(row) and not any(isinstance(value, str) for value in row.values())
    raise DataSourceError(
        f"{_place(file, start)}: no text in the field {' or '.join(TEXT_FIELDS)}; fields found"
        f"{', none of them a string' if has_none else ''}: {', '.join(row) or 'none'}",
        hint=_ONE_STRING if has_none else "rename the field that holds the text to 'text'",
    )


def _place(file: Path, start: int) -> str:
    line = 1
    with file.open("rb") as stream:
        while start > 0 and (chunk := stream.read(min(start, 2**20))):
            line += chunk.count(b"\n")
            start -= len(chunk)
    return f"text source {file}, line {line}"
