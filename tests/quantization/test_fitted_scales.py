"""Scales by least squares: against a solver of the same problem, row by row."""

import numpy as np
import pytest
import torch

from moe_tool.quantization.fitted_scales import fit_scales, quantize_fitted
from moe_tool.quantization.round_to_nearest import (
    dequantize,
    grid_scales,
    nearest_codes,
    quantize,
    wide_scales,
)


def _case(n_out: int, n_in: int, n_tokens: int = 500):
    generator = torch.Generator().manual_seed(n_in)
    weight = torch.randn(n_out, n_in, generator=generator)
    inputs = torch.randn(n_tokens, n_in, generator=generator) @ (
        torch.randn(n_in, n_in, generator=generator) / n_in**0.5
    )
    return weight, inputs


@pytest.mark.parametrize("n_in", [64, 100, 256])
@pytest.mark.parametrize("width_bits", [1, 2, 4])
def test_they_are_the_least_squares_solution(n_in: int, width_bits: int) -> None:
    group = 32
    weight, inputs = _case(7, n_in)
    scales = grid_scales(weight, width_bits, group=group)
    codes = nearest_codes(weight, wide_scales(scales, n_inputs=n_in, group=group), width_bits)
    hessian = inputs.T @ inputs / len(inputs)
    found = fit_scales(weight, codes, scales, hessian, group=group).double().numpy()
    for row in range(7):
        parts = [
            (inputs[:, g : g + group] @ codes[row, g : g + group]).double().numpy()
            for g in range(0, n_in, group)
        ]
        target = (inputs @ weight[row]).double().numpy()
        expected, *_ = np.linalg.lstsq(np.stack(parts, axis=1), target, rcond=None)
        assert found[row] == pytest.approx(expected, rel=0.02, abs=2e-3)


def test_a_row_never_gets_worse_and_dead_inputs_leave_a_scale_alone() -> None:
    weight, inputs = _case(9, 128)
    inputs[:, :64] = 0
    hessian = inputs.T @ inputs / len(inputs)
    plain, found = quantize(weight, 2), quantize_fitted(weight, hessian, 2)
    assert torch.equal(found.scales[:, 0, :9], plain.scales[:, 0, :9])

    def errors(quantized) -> torch.Tensor:
        return (inputs @ (dequantize(quantized) - weight).T).square().sum(dim=0)

    assert (errors(found) <= errors(plain) * (1 + 1e-4)).all()
    assert errors(found).sum() < 0.95 * errors(plain).sum()


def test_many_rows_are_fitted_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = _case(37, 96)
    hessian = inputs.T @ inputs / len(inputs)
    whole = quantize_fitted(weight, hessian, 2)
    monkeypatch.setattr("moe_tool.quantization.fitted_scales._ROWS_BYTES", 4 * 96 * 5)
    assert torch.equal(quantize_fitted(weight, hessian, 2).scales, whole.scales)
