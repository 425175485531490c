"""Scales weighted by the energy of inputs: by hand, and against trying everything."""

import numpy as np
import pytest
import torch

from moe_tool.quantization.round_to_nearest import dequantize, quantize
from moe_tool.quantizers.imatrix import quantize_imatrix


def _error(row: np.ndarray, energy: np.ndarray, scale: float, codes: np.ndarray) -> float:
    return float((energy * (row - scale * codes) ** 2).sum())


@pytest.mark.parametrize("width_bits", [2, 3, 4])
def test_it_is_the_best_of_all_tried_scales(width_bits: int) -> None:
    rng = np.random.default_rng(width_bits)
    weight = rng.normal(size=(6, 32)).astype(np.float32)
    energy = rng.exponential(size=32).astype(np.float32)
    found = dequantize(
        quantize_imatrix(torch.from_numpy(weight), torch.from_numpy(energy), width_bits, group=32)
    ).numpy()
    half = 2 ** (width_bits - 1)
    for row, made in zip(weight.astype(np.float64), found, strict=True):
        largest = row[np.abs(row).argmax()]
        best = np.inf
        for step in np.arange(-9, 10) / 10:
            begin = float(np.float16(largest / -half)) * half / (half + step)
            codes = np.clip(np.round(row / begin), -half, half - 1)
            scale = (energy * row * codes).sum() / (energy * codes**2).sum()
            best = min(best, _error(row, energy, scale, codes))
        assert float((energy * (row - made) ** 2).sum()) == pytest.approx(best, rel=2e-3)


def test_one_bit_is_the_weighted_mean_of_sizes() -> None:
    weight = torch.tensor([[1.0, -3.0] + [0.0] * 30])
    energy = torch.tensor([3.0, 1.0] + [0.0] * 30)
    found = dequantize(quantize_imatrix(weight, energy, 1, group=32))
    assert found[0, :2].tolist() == [1.5, -1.5]  # (3 * 1 + 1 * 3) / 4


def test_a_column_that_matters_is_rounded_better_than_others() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(64, 128, generator=generator)
    energy = torch.full((128,), 0.01)
    energy[:4] = 10.0
    found = dequantize(quantize_imatrix(weight, energy, 3, group=128)) - weight
    plain = dequantize(quantize(weight, 3, group=128)) - weight
    assert found[:, :4].norm() < 0.7 * plain[:, :4].norm()
    assert (found.square() * energy).sum() < 0.5 * (plain.square() * energy).sum()


def test_inputs_that_are_all_zero_count_as_all_alike() -> None:
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(2))
    silent = quantize_imatrix(weight, torch.zeros(96), 4, group=64)
    even = quantize_imatrix(weight, torch.ones(96), 4, group=64)
    assert torch.equal(silent.scales, even.scales)
