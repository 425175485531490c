"""A budget buys a number of expert slots; a budget that is too small is refused with one that
works."""

import re

import pytest

from moe_tool.budget.account import MemoryPlan, plan_memory
from moe_tool.budget.refusal import MemoryLine, name_lines, require_budget, suggested_budget
from moe_tool.budget.request import MemoryRequest, parse_memory
from moe_tool.budget.slots import ExpertRoom, min_slots, slots_within, split_slots
from moe_tool.errors import BudgetError

MIB = 2**20
FIXED = (
    MemoryLine(name="process", size_bytes=300 * MIB),
    MemoryLine(name="skeleton", size_bytes=100 * MIB),
)
ROOM = ExpertRoom(record_bytes=10 * MIB, n_experts=40, n_slots_min=3)


def _plan(
    asked: str | MemoryRequest, *, loading: int = 0, available: int | None = 10_000 * MIB
) -> MemoryPlan:
    return plan_memory(
        parse_memory(asked) if isinstance(asked, str) else asked,
        fixed=FIXED,
        loading_bytes=loading,
        experts=(ROOM,),
        available_bytes=available,
    )


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
    assert suggested_budget(430 * MIB) == "430.5MiB"


def test_the_peak_of_loading_counts_where_it_is_higher() -> None:
    plan = _plan("min", loading=470 * MIB)
    assert plan.n_slots == 3
    assert plan.budget_bytes == 470 * MIB
    with pytest.raises(BudgetError):
        _plan("469MiB", loading=470 * MIB)


def test_a_machine_with_less_than_the_plan_takes_is_refused() -> None:
    with pytest.raises(BudgetError, match="free here") as caught:
        _plan("50%", available=599 * MIB)
    assert str(600 * MIB) in caught.value.message and str(599 * MIB) in caught.value.message
    assert _plan("min", available=599 * MIB).n_slots == 3  # as the hint says
    assert "--memory min" in (caught.value.hint or "")
    with pytest.raises(BudgetError) as caught:
        _plan("min", available=429 * MIB)
    assert "--memory" not in (caught.value.hint or "")  # no budget works
    with pytest.raises(BudgetError):
        _plan("auto", available=440 * MIB)
    assert _plan("64GiB", available=801 * MIB).n_slots == 40


def test_a_number_of_slots_is_that_number_as_far_as_there_are_experts() -> None:
    for wanted, given in ((0, 3), (7, 7), (41, 40)):
        plan = _plan(MemoryRequest(kind="slots", n_slots=wanted))
        assert plan.n_slots == given
        assert plan.budget_bytes == (400 + 10 * given) * MIB


def test_a_plan_for_another_machine_asks_nothing_of_this_one() -> None:
    assert _plan("64GiB", available=None).n_slots == 40


def test_lines_that_take_nothing_are_left_out() -> None:
    assert [line.name for line in name_lines({"a": 1, "b": 0, "c": 2})] == ["a", "c"]


def test_work_of_any_kind_is_refused_in_the_same_words() -> None:
    lines = name_lines({"process": 300 * MIB, "one layer": 5 * MIB + 1})
    assert require_budget("tuning tiny", None, lines) == 305 * MIB + 1
    assert require_budget("tuning tiny", 305 * MIB + 1, lines) == 305 * MIB + 1
    with pytest.raises(BudgetError) as caught:
        require_budget("tuning tiny", 305 * MIB, lines, instead="fewer --tokens")
    message = caught.value.message
    assert f"tuning tiny needs 305.00 MiB ({305 * MIB + 1} bytes)" in message
    assert f"has 305.00 MiB ({305 * MIB} bytes)" in message
    assert "nearest that works is 305.6MiB" in message and "one layer" in message
    assert caught.value.hint == "--memory 305.6MiB, or fewer --tokens"
    nearest = parse_memory("305.6MiB").size_bytes
    assert require_budget("tuning tiny", nearest, lines) <= nearest


@pytest.mark.parametrize("room", range(0, 400, 7))
def test_no_more_slots_of_two_sizes_would_fit(room: int) -> None:
    rooms = (
        ExpertRoom(record_bytes=10, n_experts=9, n_slots_min=2),
        ExpertRoom(record_bytes=3, n_experts=20, n_slots_min=3),
    )

    def size(n_slots: int) -> int:
        first, second = split_slots(n_slots, rooms)
        return 10 * first + 3 * second

    fitting = [n for n in range(30) if size(n) <= room]
    assert slots_within(room, rooms) == split_slots(max(fitting, default=0), rooms)


def test_a_pool_needs_one_tokens_experts_and_one_to_read_ahead() -> None:
    assert (min_slots(2, 8), min_slots(2, 2), min_slots(8, 9)) == (3, 2, 9)


def test_work_that_reads_texts_suggests_more() -> None:
    lines = (MemoryLine(name="process", size_bytes=430 * MIB),)
    with pytest.raises(BudgetError, match=r"nearest that works is 438MiB"):
        require_budget("profiling", MIB, lines, slack_bytes=8 * MIB)
    assert require_budget("profiling", 430 * MIB, lines, slack_bytes=8 * MIB) == 430 * MIB
