"""Matrices of codes taken apart and put together again."""

from dataclasses import replace

import pytest
import torch

from moe_tool.quantization.gptq import error_spread, quantize_gptq
from moe_tool.quantization.hqq import quantize_hqq
from moe_tool.quantization.round_to_nearest import dequantize, quantize
from moe_tool.quantization.weights import IntegerWeight
from moe_tool.tuning.code_matrix import take_apart

SHAPE = (21, 80)
"""The last row block and the last group are short"""


def made(width: int, group: int = 32, *, zeros: bool = False) -> IntegerWeight:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(width))
    weight[3, :32] = 0.0  # a grid without steps
    return (quantize_hqq if zeros else quantize)(weight, width, group=group)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("width", "group"), [(1, 32), (2, 64), (3, 32), (4, 128), (8, 32)])
def test_it_stands_for_the_same_weights_and_is_stored_as_before(
    width: int, group: int, zeros: bool
) -> None:
    stored = made(width, group, zeros=zeros)
    matrix = take_apart(stored)
    assert torch.allclose(matrix.values(), dequantize(stored), rtol=1e-5, atol=1e-5)
    again = matrix.pack()
    for one, other in zip(again.planes, stored.planes, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(again.scales, stored.scales)
    assert (again.zeros is None) == (stored.zeros is None)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_a_code_that_moves_moves_its_weight_by_the_gradient(width: int) -> None:
    matrix = take_apart(made(width))
    codes = matrix.codes.clone()
    up = codes < 2**width - 1
    moved = replace(matrix, codes=codes + up)
    wanted = dequantize(moved.pack()) - dequantize(matrix.pack())
    found = matrix.by_codes(torch.ones(SHAPE)) * up
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert bool((wanted != 0).any())


def test_it_keeps_nothing_of_the_record_that_it_was_read_from() -> None:
    stored = made(2)
    matrix = take_apart(stored)
    before = matrix.values()
    for part in (*stored.planes, stored.scales):
        part.zero_()
    assert torch.equal(matrix.values(), before)
    assert torch.allclose(dequantize(matrix.pack()), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [2, 4])
def test_the_residual_is_what_rounding_lost_up_to_half_a_step(width: int) -> None:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    weight[3, :32] = 0.0
    matrix = take_apart(quantize(weight, width, group=32))
    residual = matrix.residual(weight)
    assert residual is not None
    assert float(residual.abs().max()) <= 0.5 and not bool(residual[3, :32].any())
    back = matrix.values() + matrix.by_codes(residual.clone())
    inside = residual.abs() < 0.5  # beyond the edge of a grid more was lost than half a step
    assert inside.float().mean() > 0.85
    assert torch.allclose(back[inside], weight[inside], atol=1e-4)


def test_codes_that_make_up_for_each_other_have_no_residual() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=generator)
    inputs = torch.randn(512, 8, generator=generator) @ torch.randn(8, 64, generator=generator)
    spread = error_spread(inputs.T @ inputs / 512)
    assert take_apart(quantize_gptq(weight, spread, 2)).residual(weight) is None
    assert take_apart(quantize(weight, 2)).residual(weight) is not None
