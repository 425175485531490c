"""The pool of slots."""

import pytest

from moe_tool.store.slots import SlotPool

PAGE = 4096


def test_slots_are_aligned_writable_and_apart():
    pool = SlotPool(n_slots=3, slot_size_bytes=2 * PAGE)
    taken = [pool.take() for _ in range(3)]
    assert sorted(taken) == [0, 1, 2] and pool.n_free == 0
    for slot in taken:
        assert pool.view(slot).data_ptr() % PAGE == 0
        pool.view(slot).fill_(slot + 1)
    assert [pool.view(slot).unique().tolist() for slot in range(3)] == [[1], [2], [3]]
    assert [pool.view(slot).numel() for slot in range(3)] == [2 * PAGE] * 3


def test_a_slot_that_is_given_back_can_be_taken_again():
    pool = SlotPool(n_slots=1, slot_size_bytes=PAGE)
    slot = pool.take()
    pool.give(slot)
    assert pool.take() == slot


def test_a_slot_given_twice_is_a_bug():
    pool = SlotPool(n_slots=1, slot_size_bytes=PAGE)
    slot = pool.take()
    pool.give(slot)
    with pytest.raises(AssertionError, match="free already"):
        pool.give(slot)


def test_memory_counts_once_touched_and_goes_back_on_close():
    size_bytes = 64 * 2**20
    before = _rss_bytes()
    pool = SlotPool(n_slots=2, slot_size_bytes=size_bytes // 2)
    assert _rss_bytes() - before < size_bytes // 4
    pool.view(0).fill_(1)
    pool.view(1).fill_(1)
    held = pool.view(0)
    assert _rss_bytes() - before > size_bytes * 3 // 4
    pool.close()
    assert _rss_bytes() - before < size_bytes // 4
    assert held[0] == 0


def _rss_bytes():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * PAGE
