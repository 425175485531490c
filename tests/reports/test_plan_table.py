"""What a plan's table has."""

from moe_tool.reports.plan_table import rows_to_show
from tests.reports.made_results import simulated as _row


def test_no_row_stands_there_twice_and_the_bound_is_the_last() -> None:
    lru, lfu, bound = _row(eviction="lru"), _row(eviction="lfu"), _row(eviction="belady")
    assert rows_to_show([lru], lru, bound) == [lru]
    assert rows_to_show([lru, lfu], lru, bound) == [lru, lfu, bound]
    assert rows_to_show([lfu, _row(eviction="fifo")], lru, bound) == [
        lfu,
        _row(eviction="fifo"),
        lru,
        bound,
    ]
