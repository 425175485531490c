"""A budget buys a number of expert slots; a budget that is too small is refused with one that
works."""

import re

import pytest

from moe_tool.errors import BudgetError, UsageError
from moe_tool.runtime.memory_plan import (
    ExpertRoom,
    MemoryLine,
    MemoryPlan,
    MemoryRequest,
    parse_memory,
    plan_memory,
    suggested_budget,
)

MIB = 2**20
FIXED = (
    MemoryLine(name="process", size_bytes=300 * MIB),
    MemoryLine(name="skeleton", size_bytes=100 * MIB),
)
ROOM = ExpertRoom(record_bytes=10 * MIB, n_experts=40, n_slots_min=3)


def _plan(text: str, *, loading: int = 0, available: int = 10_000 * MIB) -> MemoryPlan:
    return plan_memory(
        parse_memory(text),
        fixed=FIXED,
        loading_bytes=loading,
        experts=(ROOM,),
        available_bytes=available,
    )


def test_every_way_of_writing_a_budget_is_understood() -> None:
    assert parse_memory("4GiB") == MemoryRequest(kind="bytes", size_bytes=4 * 2**30)
    assert parse_memory("12.5%") == MemoryRequest(kind="share", share=0.125)
    assert parse_memory(" MIN ") == MemoryRequest(kind="min")
    assert parse_memory("auto") == MemoryRequest(kind="auto")


@pytest.mark.parametrize("text", ["", "half", "101%", "-1GiB", "50 percent", "4 GiBs"])
def test_anything_else_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        parse_memory(text)


def test_min_is_everything_fixed_plus_the_slots_of_one_token() -> None:
    plan = _plan("min")
    assert plan.n_slots == 3
    assert plan.budget_bytes == plan.total_bytes == 430 * MIB


def test_a_share_is_that_share_of_the_experts_on_top_of_everything_fixed() -> None:
    assert _plan("50%").n_slots == 20
    assert _plan("50%").budget_bytes == (400 + 200) * MIB
    assert _plan("51%").n_slots == 20
    assert _plan("1%").n_slots == 3
    assert _plan("100%").n_slots == 40


def test_bytes_buy_whole_slots_and_never_more_than_there_are_experts() -> None:
    assert _plan("459MiB").n_slots == 5
    assert _plan("459MiB").budget_bytes == 459 * MIB
    assert _plan("459MiB").total_bytes == 450 * MIB
    assert _plan("9000MiB").n_slots == 40


def test_auto_leaves_a_tenth_of_what_is_free() -> None:
    assert _plan("auto", available=500 * MIB).n_slots == 5
    assert _plan("auto").n_slots == 40


def test_too_small_a_budget_names_both_numbers_and_every_line() -> None:
    with pytest.raises(BudgetError) as caught:
        _plan("429MiB")
    assert str(429 * MIB) in caught.value.message
    assert str(430 * MIB) in caught.value.message
    for name in ("process", "skeleton", "expert slots"):
        assert name in caught.value.message


def test_the_suggested_budget_works_when_typed_in() -> None:
    with pytest.raises(BudgetError) as caught:
        _plan("1MiB")
    hint = re.search(r"--memory (\S+?),", str(caught.value))
    assert hint is not None
    assert _plan(hint[1]).n_slots >= 3
    assert suggested_budget(430 * MIB) == "448MiB"


def test_the_peak_of_loading_counts_where_it_is_higher() -> None:
    plan = _plan("min", loading=470 * MIB)
    assert plan.n_slots == 3
    assert plan.budget_bytes == 470 * MIB
    with pytest.raises(BudgetError):
        _plan("469MiB", loading=470 * MIB)


def test_a_machine_with_less_than_the_plan_takes_is_refused() -> None:
    with pytest.raises(BudgetError, match="free here"):
        _plan("50%", available=599 * MIB)
    with pytest.raises(BudgetError):
        _plan("auto", available=440 * MIB)
    assert _plan("64GiB", available=801 * MIB).n_slots == 40
