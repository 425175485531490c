"""What a plan's table has."""

from dataclasses import dataclass

from moe_tool.reports.plan_table import rows_to_show


@dataclass(frozen=True)
class _Row:
    eviction: str


def test_no_row_stands_there_twice_and_the_bound_is_the_last() -> None:
    lru, lfu, bound = _Row("lru"), _Row("lfu"), _Row("belady")
    assert rows_to_show([lru], lru, bound) == [lru]
    assert rows_to_show([lru, lfu], lru, bound) == [lru, lfu, bound]
    assert rows_to_show([lfu, _Row("fifo")], lru, bound) == [lfu, _Row("fifo"), lru, bound]
