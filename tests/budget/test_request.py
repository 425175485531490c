"""Budgets as people write them, and back."""

import pytest

from moe_tool.budget.request import AUTO, EVERY_EXPERT, MemoryRequest, parse_memory
from moe_tool.budget.sizes import parse_bytes, type_bytes
from moe_tool.errors import UsageError


def test_every_way_of_writing_a_budget_is_understood() -> None:
    assert parse_memory("4GiB") == MemoryRequest(kind="bytes", size_bytes=4 * 2**30)
    assert parse_memory("12.5%") == MemoryRequest(kind="share", share=0.125)
    assert parse_memory("100%") == EVERY_EXPERT
    assert parse_memory(" MIN ") == MemoryRequest(kind="min")
    assert parse_memory("auto") == AUTO


@pytest.mark.parametrize("text", ["", "half", "101%", "-1GiB", "50 percent", "4 GiBs", "7 slots"])
def test_anything_else_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_memory(text)
    assert caught.value.hint


@pytest.mark.parametrize("text", ["min", "auto", "50%", "12.5%", "100%", "4GiB", "1500MiB", "7"])
def test_a_request_is_written_as_it_was_typed(text: str) -> None:
    assert str(parse_memory(text)) == text


def test_a_number_of_slots_is_said_as_one() -> None:
    assert str(MemoryRequest(kind="slots", n_slots=7)) == "7 slots"


@pytest.mark.parametrize("size_bytes", [0, 1, 1023, 1024, 3 * 2**20, 2**30 + 1, 2**60])
def test_a_size_that_is_typed_loses_no_byte(size_bytes: int) -> None:
    assert parse_bytes(type_bytes(size_bytes)) == size_bytes
