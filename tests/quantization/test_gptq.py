"""GPTQ: against the slow rule, and by what it is for."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_tool.errors import CorruptArtifactError
from moe_tool.quantization.bit_packing import unpack
from moe_tool.quantization.fitted_scales import quantize_fitted
from moe_tool.quantization.gptq import error_spread, quantize_gptq
from moe_tool.quantization.round_to_nearest import dequantize, grid_scales, quantize


def _case(seed: int, n_out: int, n_in: int, n_tokens: int):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n_out, n_in, generator=generator)
    mix = torch.randn(n_in, n_in, generator=generator) / n_in**0.5
    inputs = torch.randn(n_tokens, n_in, generator=generator) @ mix
    return weight, inputs, inputs.T @ inputs / n_tokens


def _slow(weight, hessian, width_bits, group):
    """Optimal brain quantization in a fixed order, with the inverse worked out anew after every
    input: what the Cholesky factor stands for."""
    scales = grid_scales(weight, width_bits, group=group).double().numpy()
    left = weight.double().numpy().copy()
    n_in = left.shape[1]
    damped = hessian.double().numpy() + 0.01 * float(hessian.diagonal().mean()) * np.eye(n_in)
    order = np.argsort(-hessian.diagonal().numpy(), kind="stable")
    half = 2 ** (width_bits - 1)
    codes = np.zeros_like(left)
    for at, column in enumerate(order):
        rest = order[at:]
        inverse = np.linalg.inv(damped[np.ix_(rest, rest)])
        step = scales[:, column // group]
        codes[:, column] = np.clip(np.rint(left[:, column] / step), -half, half - 1)
        error = (left[:, column] - codes[:, column] * step) / inverse[0, 0]
        left[:, rest] -= error[:, None] * inverse[0]
    return codes + half


@pytest.mark.parametrize("width_bits", [3, 4])
def test_it_does_what_the_slow_rule_does(width_bits: int) -> None:
    weight, _, hessian = _case(1, 6, 150, 400)
    found = quantize_gptq(weight, error_spread(hessian), width_bits, group=64)
    codes = unpack(found.planes, width_bits, n_outputs=6, n_inputs=150).numpy()
    expected = _slow(weight, hessian, width_bits, 64)
    # a value that lies between two points may go either way in float32, and others follow it
    assert (codes == expected).mean() > 0.97


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("width_bits", [1, 2, 3, 4])
def test_outputs_err_less_than_with_round_to_nearest(width_bits: int, group: int) -> None:
    weight, inputs, hessian = _case(2, 32, 256, 1000)

    def error(quantized) -> float:
        return float((inputs @ (dequantize(quantized) - weight).T).norm())

    plain = quantize(weight, width_bits, group=group)
    found = quantize_gptq(weight, error_spread(hessian), width_bits, group=group)
    fitted = quantize_fitted(weight, hessian, width_bits, group=group)
    assert error(fitted) < error(plain)
    assert error(found) < (0.97 if width_bits == 1 else 0.8) * error(fitted)


def test_without_inputs_it_is_round_to_nearest() -> None:
    weight, _, _ = _case(3, 5, 96, 10)
    for width_bits in (1, 2, 3):
        plain = quantize(weight, width_bits)
        found = quantize_gptq(weight, error_spread(torch.zeros(96, 96)), width_bits)
        assert torch.equal(dequantize(found), dequantize(plain))


def test_the_spread_solves_with_the_damped_hessian() -> None:
    _, _, hessian = _case(5, 4, 80, 300)
    spread = error_spread(hessian)
    values = torch.randn(80, 3, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(spread.hessian @ spread.solve(values), values, atol=1e-3)


def test_fewer_inputs_than_a_matrix_is_wide_and_dead_ones_are_no_trouble() -> None:
    weight, inputs, _ = _case(4, 8, 128, 7)
    inputs[:, 5] = 0
    hessian = inputs.T @ inputs / 7
    found = dequantize(quantize_gptq(weight, error_spread(hessian), 2))
    assert torch.isfinite(found).all()
    plain = dequantize(quantize(weight, 2))
    assert (inputs @ (found - weight).T).norm() < (inputs @ (plain - weight).T).norm()


def test_the_weights_given_stay_and_bad_ones_are_refused() -> None:
    weight, _, hessian = _case(5, 4, 64, 100)
    kept = weight.clone()
    quantize_gptq(weight, error_spread(hessian), 4)
    assert torch.equal(weight, kept)
    weight[1, 2] = float("nan")
    with pytest.raises(CorruptArtifactError):
        quantize_gptq(weight, error_spread(hessian), 4)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 999),
    n_out=st.integers(1, 5),
    n_in=st.integers(1, 140),
    n_tokens=st.integers(1, 60),
    width_bits=st.integers(1, 8),
)
def test_any_shape_gives_points_of_the_grid(
    seed: int, n_out: int, n_in: int, n_tokens: int, width_bits: int
) -> None:
    weight, _, hessian = _case(seed, n_out, n_in, n_tokens)
    found = quantize_gptq(weight, error_spread(hessian), width_bits)
    assert found.shape == (n_out, n_in) and torch.isfinite(dequantize(found)).all()
    assert (
        int(unpack(found.planes, width_bits, n_outputs=n_out, n_inputs=n_in).max()) < 2**width_bits
    )
