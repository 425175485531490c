"""Place of a checkpoint's rows in an expert's parameter, found by converting numbered rows."""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import torch

from moe_tool.quantization.kept_codes import KeptWeight, join_rows

Convert = Callable[[Sequence[torch.Tensor]], torch.Tensor]
"""Tensors in the orientation of the checkpoint's floats -> the parameter, [out, in]"""


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
        numbered = [each.T if is_transposed else each for each in _numbered(parts)]
        floats = [each.decode().T if is_transposed else each.decode() for each in parts]
        try:
            order = convert(numbered)[:, 0].to(torch.int64)
            wanted = convert(floats)
            if torch.equal(place_rows(parts, order).decode(), wanted):
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


def _numbered(parts: Sequence[KeptWeight]) -> Iterator[torch.Tensor]:
    heights = [each.shape[0] for each in parts]
    for each, end in zip(parts, accumulate(heights), strict=True):
        rows = torch.arange(end - each.shape[0], end, dtype=torch.float32)
        yield rows[:, None].expand(each.shape).contiguous()
