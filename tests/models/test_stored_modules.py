"""Modules over stored weights answer as `nn.Linear` and `nn.Embedding` do."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moe_tool.models.stored_modules import StoredEmbedding, StoredLinear
from moe_tool.quantization.round_to_nearest import dequantize, quantize
from moe_tool.quantization.tokens import round_trip_tokens
from moe_tool.quantization.weights import FloatWeight


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("shape", [(70,), (3, 70), (2, 5, 70), (2, 3, 20, 70), (0, 70)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_floats_give_the_float32_product(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight, bias, x = drawn(33, 70).to(dtype), nn.Parameter(drawn(33)), drawn(*shape)
    found = StoredLinear(FloatWeight(values=weight), bias)(x)
    wanted = F.linear(x, weight.float(), bias)
    assert found.shape == wanted.shape and found.dtype == torch.float32
    # Sums of 70 products of size 1 in another order.
    assert torch.allclose(found, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_meet_tokens_of_eight_bits(bits: int) -> None:
    weight, x = quantize(drawn(33, 70), bits), drawn(2, 5, 70)
    tokens = round_trip_tokens(x.view(10, 70), 64).view(2, 5, 70)
    found = StoredLinear(weight)(x)
    assert torch.allclose(found, F.linear(tokens, dequantize(weight)), rtol=0, atol=2e-5)


def test_a_transposed_or_narrow_input_is_taken() -> None:
    module = StoredLinear(quantize(drawn(16, 64), 8))
    x = drawn(64, 6).T
    assert torch.equal(module(x), module(x.contiguous()))
    assert torch.equal(module(x.bfloat16()), module(x.bfloat16().float()))


def test_looked_up_rows_are_exact() -> None:
    table = drawn(11, 6).bfloat16()
    ids = torch.tensor([[3, 0], [10, 3]])
    found = StoredEmbedding(FloatWeight(values=table))(ids)
    assert found.dtype == torch.float32
    assert torch.equal(found, table.float()[ids])


def test_a_weight_that_somebody_looks_at_is_expanded() -> None:
    weight = quantize(drawn(33, 70), 4)
    assert torch.equal(StoredLinear(weight).weight, dequantize(weight))
    table = drawn(11, 6).half()
    assert torch.equal(StoredEmbedding(FloatWeight(values=table)).weight, table.float())
    assert not list(StoredLinear(weight).parameters())


def test_a_weight_or_bias_that_is_replaced_is_the_one_that_computes():
    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(3))
    first, second = (
        FloatWeight(values=torch.full((4, 32), value, dtype=torch.bfloat16)) for value in (1.0, 2.0)
    )
    module = StoredLinear(first)
    once = module(x)
    module.stored = second
    assert torch.equal(module(x), 2 * once)
    module.bias = torch.nn.Parameter(torch.ones(4), requires_grad=False)
    assert torch.equal(module(x), 2 * once + 1)
