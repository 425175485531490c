"""Documents from a .parquet file: one row each, its text in the column `text` or `content`."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moe_tool.errors import DataSourceError
from moe_tool.text import TEXT_FIELDS

if TYPE_CHECKING:
    import pyarrow.parquet

_ROWS_PER_READ = 1024


def count_row_groups(file: Path) -> int:
    """Return the number of row groups, which can be read independently.

    Raises:
        DataSourceError: not a parquet file, or one without a text column.
    """
    with _open(file) as parquet:
        _text_column(file, parquet)
        return int(parquet.num_row_groups)


def read_row_group(file: Path, row_group: int, *, rng: np.random.Generator) -> Iterator[str]:
    """Yield the texts of one row group, shuffled within each 1024 rows; rows without text are
    skipped.

    Raises:
        DataSourceError: damaged data.
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
                        yield text
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
    import pyarrow

    schema = parquet.schema_arrow
    for name in TEXT_FIELDS:
        if name in schema.names and schema.field(name).type in (
            pyarrow.string(),
            pyarrow.large_string(),
        ):
            return name
    raise DataSourceError(
        f"text source {file}: no text column {' or '.join(TEXT_FIELDS)};"
        f" columns found: {', '.join(schema.names) or 'none'}",
        hint="rename the column that holds the text to 'text'",
    )
