"""NaN and infinity are found wherever they stand, in every float type."""

import pytest
import torch

from moe_tool.formats.finite_numbers import are_finite

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("size", [1, 7, 8, 1000, 40_000])  # a scalar rest behind full vectors too
def test_one_bad_number_among_many_is_found(dtype: torch.dtype, bad: float, size: int) -> None:
    values = torch.linspace(-3, 3, size).to(dtype)
    assert are_finite(values)
    for position in {0, size // 2, size - 1}:
        broken = values.clone()
        broken[position] = bad
        assert not are_finite(broken), position


def test_the_largest_numbers_are_finite() -> None:
    for dtype in FLOATS:
        most = torch.finfo(dtype).max
        assert are_finite(torch.tensor([most, -most], dtype=dtype))


def test_integers_and_nothing_are_finite() -> None:
    assert are_finite(torch.tensor([2**62, -1]))
    assert are_finite(torch.empty(0))
