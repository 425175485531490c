"""Order in which the blocks of many documents are read."""

from collections.abc import Iterator, Sequence

import numpy as np


def interleave_blocks(
    n_blocks: Sequence[int], *, rng: np.random.Generator
) -> Iterator[tuple[int, int]]:
    """Yield every (item, block) once: rounds over the items in random order, one block of each per
    round, in a random order of its blocks.

    A short sample thus draws one block from each of many items instead of all blocks of a few, and
    a sample from one long item draws from all of it.

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
