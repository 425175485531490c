"""Half-quadratic quantization: what it minimizes, and matrices that are trouble."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_tool.errors import CorruptArtifactError
from moe_tool.experts.linear import linear
from moe_tool.quantization.bit_packing import unpack
from moe_tool.quantization.hqq import quantize_hqq
from moe_tool.quantization.round_to_nearest import dequantize
from moe_tool.quantization.tokens import round_trip_tokens


def _least_and_largest(weight: torch.Tensor, width_bits: int, group: int) -> torch.Tensor:
    """Plain asymmetric rounding, by hand."""
    parts = weight.view(len(weight), -1, group)
    low, high = parts.aminmax(dim=-1, keepdim=True)
    step = (high - low) / (2**width_bits - 1)
    return (((parts - low) / step).round() * step + low).view_as(weight)


@pytest.mark.parametrize(
    ("width_bits", "group", "share"),
    [
        *((2, 32, 0.945), (2, 64, 0.912), (2, 128, 0.863)),
        *((bits, group, 0.989) for bits in (3, 4, 8) for group in (32, 64, 128)),
    ],
)
def test_most_weights_are_met_better_than_by_a_grid_from_least_to_largest(
    width_bits: int, group: int, share: float
) -> None:
    """`share` is what is left of the loss; one turn in place of twenty leaves 0.98 at 2 bits."""
    uniform = torch.rand(320, 256, generator=torch.Generator().manual_seed(0)) - 0.5
    weight = -uniform.sign() * torch.log1p(-2 * uniform.abs())  # Laplace
    found = dequantize(quantize_hqq(weight, width_bits, group=group))
    plain = _least_and_largest(weight, width_bits, group)

    def loss(given: torch.Tensor) -> float:
        return float((given - weight).abs().pow(0.7).mean())

    assert loss(found) < share * loss(plain)


@settings(max_examples=40, deadline=None)
@given(
    n_out=st.integers(1, 20),
    n_in=st.integers(1, 140),
    width_bits=st.sampled_from([1, 2, 3, 4, 8]),
    shift=st.sampled_from([0.0, 3.0, 1e4]),
    size=st.sampled_from([0.0, 1e-6, 1.0]),
)
def test_any_matrix_comes_back_within_a_step_of_its_group(
    n_out: int, n_in: int, width_bits: int, shift: float, size: float
) -> None:
    weight = torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(n_in)) * size + shift
    found = quantize_hqq(weight, width_bits, group=32)
    back = dequantize(found)
    assert torch.isfinite(back).all()
    assert (
        int(unpack(found.planes, width_bits, n_outputs=n_out, n_inputs=n_in).max()) < 2**width_bits
    )
    spread = float(weight.max() - weight.min())
    largest = float(weight.abs().max())
    # 1e-6: steps are float16
    limit = 1.6 * max(spread, largest / 512) + 1e-3 * largest + 1e-6
    assert float((back - weight).abs().max()) <= limit


def test_zero_points_reach_the_product() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 96, generator=generator) + 0.5
    x = torch.randn(5, 96, generator=generator)
    found = quantize_hqq(weight, 3)
    expected = round_trip_tokens(x, found.group) @ dequantize(found).T
    assert torch.allclose(linear(x, found), expected, atol=2e-3)


def test_not_a_number_is_refused() -> None:
    weight = torch.zeros(4, 64)
    weight[1, 2] = float("nan")
    with pytest.raises(CorruptArtifactError):
        quantize_hqq(weight, 4)
