"""The pool of slots."""

from moe_tool.store.slots import SlotPool

PAGE = 4096


def test_slots_are_aligned_writable_and_apart():
    pool = SlotPool(n_slots=3, slot_size_bytes=2 * PAGE)
    for slot in range(3):
        assert pool.view(slot).data_ptr() % PAGE == 0
        pool.view(slot).fill_(slot + 1)
    assert [pool.view(slot).unique().tolist() for slot in range(3)] == [[1], [2], [3]]
    assert [pool.view(slot).numel() for slot in range(3)] == [2 * PAGE] * 3


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
