"""Settings of the C library's allocator: freed tensors go back to the system at once."""

import ctypes

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_THRESHOLD_BYTES = 256 * 2**10


def return_freed_memory() -> None:
    """Make glibc return every freed block of 256 KiB or more to the system, for the whole process.

    Does nothing with another C library.

    By default glibc raises its own threshold to the largest block ever freed (up to 32 MiB) and
    keeps freed blocks in one heap per thread. A KV cache that grows by concatenation then leaves a
    trail of holes, each a little too small for the next size, and the process exceeds its memory
    plan.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_ARENA_MAX, 2)
    mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES)
    mallopt(_M_TRIM_THRESHOLD, _THRESHOLD_BYTES)


def trim() -> None:
    """Return the free top of the heap to the system, if the C library can."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return
