"""Sizes as people write them, and what is none."""

import pytest

from moe_tool.budget.sizes import parse_bytes
from moe_tool.errors import UsageError


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("123", 123), ("4G", 2**32), ("4GB", 4 * 10**9), ("1.5KiB", 1536), ("1048576TiB", 2**60)],
)
def test_a_size_is_read(text: str, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize("text", ["", "x", "-1", "4XB", "2000000TiB", "9" * 400, "9" * 5000])
def test_what_is_no_size_is_refused_with_a_hint(text: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_bytes(text)
    assert error.value.hint
