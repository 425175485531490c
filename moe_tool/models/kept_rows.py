"""Place of a checkpoint's rows in an expert's parameter, found by converting numbered rows."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate

import torch

from moe_tool.quantization.kept_codes import KeptWeight, join_rows

Convert = Callable[[Sequence[torch.Tensor]], torch.Tensor]
"""Tensors in the orientation of the checkpoint's floats -> the parameter, [out, in]"""
_BLOCK_WEIGHTS = 2**16
_BLOCKS = 32


def row_order(parts: Sequence[KeptWeight], convert: Convert) -> torch.Tensor | None:
    """Return which row of the parts, one below the other, each row of the parameter is.

    Args:
        parts: the codes of one expert.
        convert: makes the parameter from the parts' floats.

    Returns:
        int64 [out], such that `place_rows` makes the same numbers as `convert`; None if a parameter
        is more than its parts' rows in some order.
    """
    for is_transposed in (False, True):
        try:
            order = convert(_turned(_numbered(parts), is_transposed))[:, 0].to(torch.int64)
            wanted = convert(_turned(_decoded(parts), is_transposed))
            placed = _blocks(place_rows(parts, order))
            if all(torch.equal(rows, wanted[at]) for at, rows in placed):
                return order
        except (RuntimeError, ValueError, IndexError):  # another orientation than this
            continue
    return None


def place_rows(parts: Sequence[KeptWeight], order: torch.Tensor) -> KeptWeight:
    """Return the parts as one matrix with its rows in this order.

    Raises:
        ValueError: the parts differ in more than their rows.
    """
    joined = join_rows(parts)
    if torch.equal(order, torch.arange(joined.shape[0])):
        return joined
    return joined.rows(order)


def _turned(tensors: Iterable[torch.Tensor], is_transposed: bool) -> list[torch.Tensor]:
    return [each.T if is_transposed else each for each in tensors]


def _numbered(parts: Sequence[KeptWeight]) -> Iterator[torch.Tensor]:
    ends = accumulate(each.shape[0] for each in parts)
    for each, end in zip(parts, ends, strict=True):
        rows = torch.arange(end - each.shape[0], end, dtype=torch.float32)
        yield rows[:, None].expand(each.shape).contiguous()


def _decoded(parts: Sequence[KeptWeight]) -> Iterator[torch.Tensor]:
    for each in parts:
        floats = torch.empty(each.shape)
        for at, rows in _blocks(each):
            floats[at] = rows
        yield floats


def _blocks(weight: KeptWeight) -> Iterator[tuple[slice, torch.Tensor]]:
    """Decode some rows at a time: decoding takes several times the room of its result."""
    n_rows = max(1, _BLOCK_WEIGHTS // weight.shape[1], weight.shape[0] // _BLOCKS)
    for first in range(0, weight.shape[0], n_rows):
        at = slice(first, first + n_rows)
        yield at, weight.decode(at.start, min(at.stop, weight.shape[0]))
