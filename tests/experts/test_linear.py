"""The blocked product against the plain one over the dequantized weight."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_tool.experts.linear import linear
from moe_tool.quantization.bit_packing import pack
from moe_tool.quantization.round_to_nearest import dequantize, quantize, tile_rows
from moe_tool.quantization.tokens import round_trip_tokens
from moe_tool.quantization.weights import FloatWeight, IntegerWeight

# A product of 300 terms in float32, summed in another order: 300 * 2**-24 relative to the sum of
# magnitudes.
RELATIVE = 300 * 2**-24


def test_float32_weights_give_exactly_what_the_ordinary_model_computes():
    x, values = torch.randn(5, 300), torch.randn(70, 300)
    assert torch.equal(linear(x, FloatWeight(values)), F.linear(x, values))


def test_a_bias_is_added_after_the_product():
    x, values, bias = torch.randn(5, 30), torch.randn(7, 30), torch.randn(7)
    assert torch.equal(
        linear(x, FloatWeight(values), FloatWeight(bias)), F.linear(x, values) + bias
    )


def test_a_bias_may_be_narrower_than_the_product():
    x, values = torch.randn(2, 30), torch.randn(7, 30)
    bias = torch.randn(7).to(torch.bfloat16)
    expected = F.linear(x, values) + bias.float()
    assert torch.equal(linear(x, FloatWeight(values), FloatWeight(bias)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n_tokens", [1, 3, 40])
def test_narrow_floats_are_multiplied_in_float32(dtype, n_tokens):
    x = torch.randn(n_tokens, 2**10)
    values = torch.randn(2**10 + 5, 2**10).to(dtype)  # more than one block of either size
    expected = F.linear(x.double(), values.double())
    bound = 2**10 * 2**-24 * F.linear(x.double().abs(), values.double().abs())
    assert ((linear(x, FloatWeight(values)) - expected).abs() <= bound).all()


@pytest.mark.parametrize("width_bits", [8, 4])
def test_integer_codes_by_hand(width_bits):
    codes = torch.tensor([[-8, 7, 1, 0], [2, -3, 5, -1]]) + 2 ** (width_bits - 1)
    weight = IntegerWeight(
        planes=pack(codes.to(torch.uint8), width_bits),
        scales=tile_rows(torch.tensor([[0.5], [2.0]], dtype=torch.float16)),
        width_bits=width_bits,
        group=64,
        n_outputs=2,
        n_inputs=4,
    )
    # 127 is the largest, so the scale of the tokens is 1 and whole numbers stay what they are.
    x = torch.tensor([[1.0, 2.0, 3.0, 127.0], [127.0, 0.0, 0.0, 0.0]])
    # row 0: 0.5 * (-8 + 14 + 3 + 0); row 1: 2 * (2 - 6 + 15 - 127)
    assert linear(x, weight).tolist() == [[4.5, -232.0], [-508.0, 508.0]]


def plain_product(x, weight):
    """Float64 over the tokens and the weight as they are rounded, and the size of its terms."""
    tokens, plain = round_trip_tokens(x, weight.group).double(), dequantize(weight).double()
    return F.linear(tokens, plain), F.linear(tokens.abs(), plain.abs())


@settings(max_examples=60, deadline=None)
@given(
    width_bits=st.integers(1, 8),
    n_tokens=st.integers(0, 20),
    n_outputs=st.integers(1, 40),
    n_inputs=st.integers(1, 300),
    seed=st.integers(0, 2**20),
)
@example(width_bits=1, n_tokens=9, n_outputs=1, n_inputs=55, seed=171)  # a code on a tie
def test_integer_weights_of_any_shape_agree_with_the_dequantized_product(
    width_bits, n_tokens, n_outputs, n_inputs, seed
):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_tokens, n_inputs, generator=generator)
    weight = quantize(torch.randn(n_outputs, n_inputs, generator=generator), width_bits)
    expected, size = plain_product(x, weight)
    assert ((linear(x, weight) - expected).abs() <= RELATIVE * size).all()


@pytest.mark.parametrize("width_bits", [8, 4])
@pytest.mark.parametrize("n_tokens", [1, 17])
def test_several_blocks_of_rows_agree_with_the_dequantized_product(width_bits, n_tokens):
    n_inputs = 2**12
    x = torch.randn(n_tokens, n_inputs)
    weight = quantize(torch.randn(600, n_inputs), width_bits)
    expected, size = plain_product(x, weight)
    assert ((linear(x, weight) - expected).abs() <= n_inputs * 2**-24 * size).all()
    assert torch.equal(linear(x, weight), linear(x, weight))
