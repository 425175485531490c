"""Round-to-nearest: by hand, against a slow second implementation, and at the edges of float16."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_tool.errors import CorruptArtifactError
from moe_tool.quantization.bit_packing import unpack
from moe_tool.quantization.round_to_nearest import dequantize, quantize, round_trip
from moe_tool.quantization.weights import IntegerWeight

WIDTHS = (8, 4, 3, 2, 1)


def signed_codes(weight: IntegerWeight) -> list[list[int]]:
    n_out, n_in = weight.shape
    codes = unpack(weight.planes, weight.width_bits, n_outputs=n_out, n_inputs=n_in).int()
    found: list[list[int]] = (codes - 2 ** (weight.width_bits - 1)).tolist()
    return found


def scales_by_row(weight: IntegerWeight) -> list[list[float]]:
    rows = weight.scales.transpose(1, 2).reshape(-1, weight.scales.shape[1])
    found: list[list[float]] = rows[: weight.n_outputs].tolist()
    return found


def slow_round_trip(weight: np.ndarray, width_bits: int, group: int = 64) -> np.ndarray:
    """The rule, weight by weight."""
    result = np.zeros(weight.shape, dtype=np.float32)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group):
            part = weight[row, start : start + group].astype(np.float32)
            if width_bits == 1:
                scale = np.float32(np.float16(np.abs(part).astype(np.float64).mean()))
                codes = np.where(part < 0, -1.0, 1.0).astype(np.float32)
            else:
                half = 2 ** (width_bits - 1)
                low, high = part.min(), part.max()
                largest = low if -low > high else high
                scale = np.float32(np.float16(largest / np.float32(-half)))
                # The product with the inverse, in float32, as the fast one has it.
                inverse = np.float32(0) if scale == 0 else np.float32(1) / scale
                codes = np.clip(np.rint(part * inverse), -half, half - 1).astype(np.float32)
            result[row, start : start + group] = codes * scale
    return result


def test_four_bits_by_hand() -> None:
    # Largest magnitude -4, so d = -4 / -8 = 0.5; 0.3 / 0.5 rounds to 1, 1.2 / 0.5 to 2.
    weight = torch.tensor([[-4.0, 0.3, 1.2, 3.5]])
    found = quantize(weight, 4)
    assert scales_by_row(found) == [[0.5]] and found.scales.dtype == torch.float16
    assert signed_codes(found) == [[-8, 1, 2, 7]]
    assert dequantize(found).tolist() == [[-4.0, 0.5, 1.0, 3.5]]
    assert found.shape == (1, 4)


def test_a_positive_largest_weight_gives_a_negative_scale() -> None:
    # d = 4 / -8 = -0.5, so +4 is code -8 exactly; -4 would be code 8 and is cut to 7.
    found = quantize(torch.tensor([[4.0, -4.0, -1.0]]), 4)
    assert scales_by_row(found) == [[-0.5]]
    assert signed_codes(found) == [[-8, 7, 2]]
    assert dequantize(found).tolist() == [[4.0, -3.5, -1.0]]


def test_eight_bits_by_hand() -> None:
    # d = -64 / -128 = 0.5.
    found = quantize(torch.tensor([[-64.0, 63.5, 0.5, 0.0]]), 8)
    assert scales_by_row(found) == [[0.5]]
    assert signed_codes(found) == [[-128, 127, 1, 0]]


def test_halves_round_to_the_even_code() -> None:
    # d = 1: 0.5 -> 0, 1.5 -> 2, 2.5 -> 2.
    found = quantize(torch.tensor([[-8.0, 0.5, 1.5, 2.5]]), 4)
    assert signed_codes(found) == [[-8, 0, 2, 2]]


def test_one_bit_by_hand() -> None:
    # The mean magnitude is (1 + 2 + 3 + 0) / 4 = 1.5; zero counts as positive.
    assert round_trip(torch.tensor([[1.0, -2.0, 3.0, 0.0]]), 1).tolist() == [[1.5, -1.5, 1.5, 1.5]]


def test_two_bits_by_hand() -> None:
    # d = -2 / -2 = 1: codes -2 ... 1.
    assert round_trip(torch.tensor([[-2.0, 1.9, 0.4, -0.6]]), 2).tolist() == [
        [-2.0, 1.0, 0.0, -1.0]
    ]


@pytest.mark.parametrize("width_bits", WIDTHS)
@pytest.mark.parametrize("n_in", [1, 63, 64, 65, 130])
def test_it_does_what_the_slow_rule_does(width_bits: int, n_in: int) -> None:
    generator = torch.Generator().manual_seed(n_in)
    weight = torch.randn(5, n_in, generator=generator)
    # Mean magnitudes may differ in the last bit of float16, by the order of the sum.
    tolerance = 2**-10 if width_bits == 1 else 0
    expected = slow_round_trip(weight.numpy(), width_bits)
    np.testing.assert_allclose(round_trip(weight, width_bits).numpy(), expected, rtol=tolerance)


@pytest.mark.parametrize("width_bits", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_packed_is_what_was_priced(width_bits: int, dtype: torch.dtype) -> None:
    weight = torch.randn(7, 100, generator=torch.Generator().manual_seed(1)).to(dtype)
    kept = weight.clone()
    packed = quantize(weight, width_bits)
    assert torch.equal(dequantize(packed), round_trip(weight, width_bits))
    assert packed.scales.shape == (1, 2, 16)
    assert torch.equal(weight, kept)


@pytest.mark.parametrize("width_bits", WIDTHS)
def test_no_rows_group_touches_another(width_bits: int) -> None:
    weight = torch.randn(3, 150, generator=torch.Generator().manual_seed(2))
    changed = weight.clone()
    changed[1, 64:128] *= 1000
    same = torch.ones(3, 150, dtype=torch.bool)
    same[1, 64:128] = False
    before, after = round_trip(weight, width_bits), round_trip(changed, width_bits)
    assert torch.equal(before[same], after[same])


@pytest.mark.parametrize("width_bits", WIDTHS)
def test_a_group_of_zeros_stays_zero(width_bits: int) -> None:
    weight = torch.randn(2, 128, generator=torch.Generator().manual_seed(3))
    weight[0, :64] = 0
    found = round_trip(weight, width_bits)
    assert (found[0, :64] == 0).all() and torch.isfinite(found).all()
    packed = quantize(weight, width_bits)
    assert scales_by_row(packed)[0][0] == 0
    if width_bits > 1:
        assert not any(signed_codes(packed)[0][:64])


@pytest.mark.parametrize("width_bits", WIDTHS)
@pytest.mark.parametrize("size", [3e38, 1e6, 1e-6, 1e-30, 1e-45])
def test_weights_beyond_float16_stay_finite(width_bits: int, size: float) -> None:
    weight = torch.tensor([[size, -size / 2, 0.0, size / 3]])
    found = round_trip(weight, width_bits)
    assert torch.isfinite(found).all()
    assert found.abs().max() <= 65504.0 * 2 ** (width_bits - 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("width_bits", WIDTHS)
@pytest.mark.parametrize("place", [0, 64, 69])
def test_weights_that_are_no_numbers_are_refused(bad: float, width_bits: int, place: int) -> None:
    weight = torch.ones(2, 70)
    weight[1, place] = bad
    with pytest.raises(CorruptArtifactError, match="NaN or infinite"):
        round_trip(weight, width_bits)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), width_bits=st.sampled_from([8, 4, 3, 2]))
def test_no_weight_moves_further_than_half_a_step_but_the_one_cut_at_the_top(
    data: st.DataObject, width_bits: int
) -> None:
    n_in = data.draw(st.integers(1, 70))
    number = st.floats(-100, 100, width=32).filter(lambda x: x == 0 or abs(x) > 1e-2)
    row = data.draw(st.lists(number, min_size=n_in, max_size=n_in))
    weight = torch.tensor([row])
    moved = (round_trip(weight, width_bits) - weight).abs()[0]
    for start in range(0, n_in, 64):
        step = weight[0, start : start + 64].abs().max() / 2 ** (width_bits - 1)
        # The grid has no point at +2**(b-1): a weight of the opposite sign may lose a whole step.
        # float16 rounds the step by at most 2**-11 of itself, once per code.
        slack = 1 + 2 ** (width_bits - 1) * 2**-10
        assert (moved[start : start + 64] <= step * slack).all()
        inside = weight[0, start : start + 64].abs() <= step * (2 ** (width_bits - 1) - 1)
        assert (moved[start : start + 64][inside] <= step * (0.5 + 2**-10 * 2**width_bits)).all()
