"""Strings are read from a parquet file however Arrow has written them."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from moe_tool.errors import DataSourceError
from moe_tool.text.parquet_rows import count_row_groups, read_row_group

TEXTS = ["one", "café 漢字", "", None, "two"]
FULL = ["café 漢字", "one", "two"]


def read(file: Path) -> list[str]:
    rng = np.random.default_rng(0)
    return sorted(
        text
        for group in range(count_row_groups(file))
        for text in read_row_group(file, group, rng=rng)
    )


def as_bytes(texts: list[str | None]) -> list[bytes | None]:
    return [None if text is None else text.encode() for text in texts]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(TEXTS, pa.string()),
        pa.array(TEXTS, pa.large_string()),
        pa.array(TEXTS, pa.string_view()),
        pa.array(TEXTS).dictionary_encode(),
        pa.array(TEXTS, pa.large_string()).dictionary_encode(),
        pa.array(as_bytes(TEXTS), pa.binary()),
        pa.array(as_bytes(TEXTS), pa.large_binary()),
        pa.array(as_bytes(TEXTS), pa.binary_view()),
    ],
    ids=lambda column: str(column.type),
)
@pytest.mark.parametrize("name", ["text", "content"])
def test_every_kind_of_string_is_read(column: Any, name: str, tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"id": list(range(5)), name: column}), file)
    assert read(file) == FULL


def test_the_first_column_that_holds_text_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": [1, 2], "content": ["a", "b"]}), file)
    assert read(file) == ["a", "b"]


@pytest.mark.parametrize(
    ("column", "says"),
    [
        (pa.array([["a"], ["b"]]), "the column text holds list<element: string>, not text"),
        (pa.array([1, 2]), "the column text holds int64, not text"),
    ],
    ids=lambda value: str(value)[:10],
)
def test_a_column_of_another_type_is_named_with_it(column: Any, says: str, tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": column}), file)
    with pytest.raises(DataSourceError) as caught:
        count_row_groups(file)
    assert says in caught.value.message


def test_columns_of_other_names_are_listed_with_their_types(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"body": ["a"], "n": [1]}), file)
    with pytest.raises(DataSourceError, match=r"found: body \(string\), n \(int64\)"):
        count_row_groups(file)


def test_bytes_that_are_not_utf8_are_damage(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": pa.array([b"caf\xe9"])}), file)
    with pytest.raises(DataSourceError, match="row group 0"):
        read(file)


def test_a_rename_is_advised_only_where_a_column_holds_text(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    for table, says in (
        ({"body": ["a"], "n": [1]}, "rename the column"),
        ({"messages": [[{"role": "user", "content": "a"}]]}, "as one string"),
    ):
        parquet.write_table(pa.table(table), file)
        with pytest.raises(DataSourceError) as caught:
            count_row_groups(file)
        assert caught.value.hint is not None and says in caught.value.hint
