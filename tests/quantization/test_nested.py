"""Nested codes: what their first bits stand for, and what choosing for two at once costs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_tool.quantization.bit_packing import pack
from moe_tool.quantization.fitted_scales import quantize_fitted
from moe_tool.quantization.gptq import error_spread, quantize_gptq
from moe_tool.quantization.nested import GptqTarget, quantize_nested_gptq, with_base
from moe_tool.quantization.round_to_nearest import dequantize, quantize, tile_rows
from moe_tool.quantization.weights import IntegerWeight


def _step(weight: torch.Tensor) -> torch.Tensor:
    """[out, 1]: the largest step of a row's grid of four bits."""
    return weight.abs().amax(dim=1, keepdim=True) / 8


def _case(seed: int, n_out: int = 32, n_in: int = 256, n_tokens: int = 1000):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n_out, n_in, generator=generator)
    mix = torch.randn(n_in, n_in, generator=generator) / n_in**0.5
    inputs = torch.randn(n_tokens, n_in, generator=generator) @ mix
    return weight, inputs, inputs.T @ inputs / n_tokens


@pytest.mark.parametrize(
    ("width_bits", "middles"),
    [(4, [-6.5, -2.5, 1.5, 5.5]), (3, [-3.5, -1.5, 0.5, 2.5])],
)
def test_first_bits_are_the_middle_of_the_codes_that_begin_with_them(
    width_bits: int, middles: list[float]
) -> None:
    codes = torch.arange(2**width_bits, dtype=torch.uint8)[None].repeat(1, 32)[:, :32]
    scales = tile_rows(torch.tensor([[0.5]], dtype=torch.float16))
    coded = IntegerWeight(
        planes=pack(codes, width_bits),
        scales=scales,
        base_scales=scales / 2,
        width_bits=width_bits,
        group=64,
        n_outputs=1,
        n_inputs=32,
    )
    expected = torch.tensor(middles)[codes.long() >> (width_bits - 2)] * 0.5
    assert torch.equal(dequantize(coded.base), expected)
    whole = dequantize(coded)
    for first in range(4):
        begins = (codes >> (width_bits - 2)) == first
        assert whole[begins].mean() == pytest.approx(middles[first] * 0.5)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 999),
    width_bits=st.sampled_from([3, 4]),
    group=st.sampled_from([32, 64, 128]),
    n_out=st.integers(1, 40),
    n_in=st.integers(1, 200),
)
def test_a_base_leaves_the_codes_alone_and_errs_by_half_its_step(
    seed: int, width_bits: int, group: int, n_out: int, n_in: int
) -> None:
    weight = torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(seed))
    plain = quantize(weight, width_bits, group=group)
    nested = with_base(weight, plain)
    assert torch.equal(dequantize(nested), dequantize(plain))
    assert nested.base.planes[0] is plain.planes[0]
    step = (dequantize(plain) - dequantize(nested.base)).abs()
    most = plain.scales.float().abs().max() * (2 ** (width_bits - 2) - 1) / 2
    assert float(step.max()) <= float(most) * 1.001


@pytest.mark.parametrize("width_bits", [3, 4])
def test_rounded_to_nearest_a_base_is_as_good_as_a_copy_of_two_bits(width_bits: int) -> None:
    weight, inputs, hessian = _case(5)

    def error(found: IntegerWeight) -> float:
        return float((inputs @ (dequantize(found) - weight).T).norm())

    assert error(with_base(weight, quantize(weight, width_bits)).base) < 1.1 * error(
        quantize(weight, 2)
    )
    fitted = with_base(weight, quantize_fitted(weight, hessian, width_bits), hessian)
    assert error(fitted.base) < 1.1 * error(quantize_fitted(weight, hessian, 2))
    assert error(fitted.base) < error(with_base(weight, fitted).base)


@pytest.mark.parametrize(("width_bits", "most"), [(3, 1.35), (4, 1.6)])
def test_gptq_chooses_for_both(width_bits: int, most: float) -> None:
    weight, inputs, hessian = _case(6)
    spread = error_spread(hessian)

    def error(found: IntegerWeight) -> float:
        return float((inputs @ (dequantize(found) - weight).T).norm())

    target = GptqTarget(weight=weight, spread=spread)
    nested = quantize_nested_gptq(target, target, width_bits, group=64)
    whole = quantize_gptq(weight, spread, width_bits)
    assert error(nested) < most * error(whole)
    assert error(nested.base) < 1.35 * error(quantize_gptq(weight, spread, 2))
    # what it is for: the first bits of codes that were chosen for themselves alone err far more
    assert error(nested.base) < 0.85 * error(with_base(weight, whole, hessian).base)


def test_each_matrix_is_fitted_to_its_own_inputs_and_target() -> None:
    weight, inputs, hessian = _case(7)
    other = weight + 0.3 * torch.randn(weight.shape, generator=torch.manual_seed(1))
    _, others, other_hessian = _case(8)
    spread = error_spread(hessian)
    full = GptqTarget(weight=weight, spread=spread)
    base = GptqTarget(weight=other, spread=error_spread(other_hessian, spread.order))
    found = quantize_nested_gptq(full, base, 4, group=64)
    same = quantize_nested_gptq(full, full, 4, group=64)

    def error(weights: torch.Tensor) -> float:
        return float((others @ (weights - other).T).norm())

    assert error(dequantize(found.base)) < 0.8 * error(dequantize(same.base))


@pytest.mark.parametrize("n_in", [5, 130])
def test_without_inputs_codes_are_those_of_the_nearest_and_finite(n_in: int) -> None:
    weight = torch.randn(7, n_in, generator=torch.manual_seed(0))
    weight[3] = 0
    spread = error_spread(torch.zeros(n_in, n_in))
    target = GptqTarget(weight=weight, spread=spread)
    found = quantize_nested_gptq(target, target, 4, group=64)
    assert torch.isfinite(dequantize(found)).all() and torch.isfinite(dequantize(found.base)).all()
    assert not dequantize(found)[3].any() and not dequantize(found.base)[3].any()
    difference = (dequantize(found) - dequantize(quantize(weight, 4))).abs()
    assert (difference <= 1.01 * _step(weight)).all()
