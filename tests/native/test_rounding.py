"""Rounding in compiled kernels: what the definition makes, to the last bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_tool.errors import CorruptArtifactError
from moe_tool.native.kernels import is_native, set_threads
from moe_tool.native.rounding import round_matrix
from moe_tool.quantization.round_to_nearest import quantize
from tests.native.test_kernels import ANY_SHAPE

pytestmark = pytest.mark.skipif(not is_native(), reason="no compiled kernels")


@ANY_SHAPE
@given(
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    width_bits=st.integers(1, 8),
    group=st.sampled_from([32, 64, 128]),
    n_out=st.integers(1, 50),
    n_in=st.integers(1, 300),
    size=st.sampled_from([1.0, 1e-6, 3e4]),
    threads=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_it_is_the_definition(
    implementation: str,
    dtype: torch.dtype,
    width_bits: int,
    group: int,
    n_out: int,
    n_in: int,
    size: float,
    threads: int,
    seed: int,
) -> None:
    set_threads(threads)
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(n_out, n_in, generator=draw) * size
    weight[torch.rand(n_out, generator=draw) < 0.1] = 0  # whole rows
    weight[torch.rand(n_out, n_in, generator=draw) < 0.1] *= -0.0
    weight = weight.clamp(-6e4, 6e4).to(dtype)
    expected = quantize(weight, width_bits, group=group)
    found = round_matrix(weight, width_bits, group=group)
    assert torch.equal(found.scales.view(torch.int16), expected.scales.view(torch.int16))
    assert all(map(torch.equal, found.planes, expected.planes))


def test_scales_beyond_float16_are_cut_off_likewise(implementation: str) -> None:
    weight = torch.tensor([[3e38, -1e38] * 32, [7e5, 1.0] * 32])
    expected, found = quantize(weight, 4), round_matrix(weight, 4)
    assert torch.equal(found.scales, expected.scales)
    assert all(map(torch.equal, found.planes, expected.planes))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_no_number_is_refused(implementation: str, bad: float, dtype: torch.dtype) -> None:
    weight = torch.randn(20, 70).to(dtype)
    weight[17, 69] = bad
    with pytest.raises(CorruptArtifactError, match="NaN or infinite"):
        round_matrix(weight, 4)


def test_a_view_is_rounded_as_it_looks(implementation: str) -> None:
    weight = torch.randn(70, 40).to(torch.bfloat16).T
    assert all(map(torch.equal, round_matrix(weight, 3).planes, quantize(weight, 3).planes))
