"""One pool of equal slots in memory, each holding one expert record."""

import mmap
from contextlib import suppress

import torch


class SlotPool:
    """A page-aligned anonymous mapping: pages count once touched and are given back on close."""

    def __init__(self, *, n_slots: int, slot_size_bytes: int) -> None:
        """Reserve the pool; no page is touched yet."""
        assert n_slots >= 1 and slot_size_bytes % mmap.PAGESIZE == 0
        self._slot_size_bytes = slot_size_bytes
        self._mapping = mmap.mmap(
            -1, n_slots * slot_size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
        # A direct read pins every page that it fills; large pages cut its CPU time to two thirds. A
        # kernel without large pages refuses.
        with suppress(OSError):
            self._mapping.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = torch.frombuffer(self._mapping, dtype=torch.uint8)

    def view(self, slot: int) -> torch.Tensor:
        """Return a slot's memory, [slot_size_bytes] uint8; writing to it writes to the slot."""
        start = slot * self._slot_size_bytes
        return self._bytes[start : start + self._slot_size_bytes]

    def close(self) -> None:
        """Free all memory at once; views that are still held read zeros from now on."""
        self._mapping.madvise(mmap.MADV_DONTNEED)
