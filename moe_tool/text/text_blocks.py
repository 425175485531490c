"""Blocks of text: their limits, found without reading what precedes, and their order of reading."""

import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

BLOCK_BYTES = 8192

_PARAGRAPH_END = re.compile(rb"\n[ \t\r]*\n")


def count_blocks(size_bytes: int) -> int:
    """Return the number of blocks in a text of `size_bytes` bytes; some may be empty."""
    return -(-size_bytes // BLOCK_BYTES)


def block_range(
    block: int, *, size_bytes: int, read: Callable[[int, int], bytes]
) -> tuple[int, int]:
    """Return the byte offsets of a block's start and end; blocks have no gaps or overlaps.

    Cut number i is in [i, i + 1) * 8192: after the first blank line there, else after the first
    line end, else at the first byte that begins a UTF-8 character. So every block can be found
    independently, and none is longer than 16 kB.

    Args:
        read: function (offset, length) that returns at most `length` bytes of the text.
    """
    return _cut(block, size_bytes, read), _cut(block + 1, size_bytes, read)


def split_text(text: str) -> list[str]:
    """Return the blocks of a text in order, without blocks of white space."""
    content = text.encode()
    ranges = (
        block_range(
            block, size_bytes=len(content), read=lambda start, size: content[start : start + size]
        )
        for block in range(count_blocks(len(content)))
    )
    blocks = [content[start:end].decode() for start, end in ranges]
    return [block for block in blocks if block.strip()]


def interleave_blocks(
    n_blocks: Sequence[int], *, rng: np.random.Generator
) -> Iterator[tuple[int, int]]:
    """Yield every (item, block) once, in rounds over the items in random order.

    Each round takes one random block of each item. A short sample thus has one block of many items
    instead of all blocks of a few, and a sample of one long item is spread over it.

    Args:
        n_blocks: number of blocks per item; items without blocks are skipped.
    """
    waiting = [
        (int(item), rng.permutation(n_blocks[item])) for item in rng.permutation(len(n_blocks))
    ]
    round_number = 0
    while waiting := [(item, blocks) for item, blocks in waiting if len(blocks) > round_number]:
        for item, blocks in waiting:
            yield item, int(blocks[round_number])
        round_number += 1


def _cut(number: int, size_bytes: int, read: Callable[[int, int], bytes]) -> int:
    start = number * BLOCK_BYTES
    if number == 0 or start >= size_bytes:
        return min(start, size_bytes)
    window = read(start, BLOCK_BYTES)
    match = _PARAGRAPH_END.search(window)
    if match:
        return start + match.end()
    line_end = window.find(b"\n")
    if line_end >= 0:
        return start + line_end + 1
    return start + next((i for i, byte in enumerate(window[:4]) if byte & 0xC0 != 0x80), 0)
