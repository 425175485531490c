"""Order of reading blocks of many documents."""

from collections.abc import Iterator, Sequence

import numpy as np


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
