"""Documents from a .parquet file: one per row, its text in the column `text` or `content`."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moe_tool.errors import DataSourceError
from moe_tool.text import TEXT_FIELDS

if TYPE_CHECKING:
    import pyarrow.parquet

_ROWS_PER_READ = 1024
_ONE_STRING = (
    "write each row's text as one string into a column 'text'; turns of a chat are joined first, "
    "e.g. by the tokenizer's chat template"
)


def count_row_groups(file: Path) -> int:
    """Return the number of row groups, which can be read independently.

    Raises:
        DataSourceError: it is not a parquet file, or has no text column.
    """
    with _open(file) as parquet:
        _text_column(file, parquet)
        return int(parquet.num_row_groups)


def read_row_group(file: Path, row_group: int, *, rng: np.random.Generator) -> Iterator[str]:
    """Yield the texts of one row group, shuffled within each 1024 rows; rows without text are
    skipped.

    Raises:
        DataSourceError: the data is damaged.
    """
    import pyarrow

    with _open(file) as parquet:
        column = _text_column(file, parquet)
        try:
            for batch in parquet.iter_batches(
                _ROWS_PER_READ, row_groups=[row_group], columns=[column]
            ):
                texts = batch.column(0)
                for row in rng.permutation(len(texts)):
                    text = texts[int(row)].as_py()
                    if text:
                        yield text.decode("utf-8") if isinstance(text, bytes) else text
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataSourceError(
                f"text source {file}, row group {row_group}: damaged ({error})"
            ) from error


def _open(file: Path) -> "pyarrow.parquet.ParquetFile":
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataSourceError(
            f"text source {file}: not a readable parquet file ({error})"
        ) from error


def _text_column(file: Path, parquet: "pyarrow.parquet.ParquetFile") -> str:
    schema = parquet.schema_arrow
    named = [name for name in TEXT_FIELDS if name in schema.names]
    for name in named:
        if _holds_text(schema.field(name).type):
            return name
    if named:
        raise DataSourceError(
            f"text source {file}: the column {named[0]} holds {schema.field(named[0]).type}, not "
            "text",
            hint=_ONE_STRING,
        )
    found = [f"{field.name} ({str(field.type)[:40]})" for field in schema]
    raise DataSourceError(
        f"text source {file}: no text column {' or '.join(TEXT_FIELDS)};"
        f" columns found: {', '.join(found) or 'none'}",
        hint="rename the column that holds the text, one string per row, to 'text'"
        if any(_holds_text(field.type) for field in schema)
        else _ONE_STRING,
    )


def _holds_text(kind: "pyarrow.DataType") -> bool:
    """Return whether an Arrow type holds strings: plain, large, views, UTF-8 bytes, or dictionaries
    of these, as written by Polars and others."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return _holds_text(kind.value_type)
    text = (types.is_string, types.is_large_string, types.is_string_view)
    data = (types.is_binary, types.is_large_binary, types.is_binary_view)
    return any(is_kind(kind) for is_kind in (*text, *data))
