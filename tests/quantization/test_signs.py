"""Signs with one scale for the matrix, as Mixture Compressor prints them."""

import pytest
import torch

from moe_tool.errors import CorruptArtifactError
from moe_tool.quantization.round_to_nearest import dequantize, quantize
from moe_tool.quantizers.mc import quantize_signs


@pytest.mark.parametrize("group", [32, 64, 128])
def test_every_weight_becomes_its_sign_times_the_mean_of_all(group: int) -> None:
    weight = torch.randn(24, 80, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 81)
    found = dequantize(quantize_signs(weight, group=group))
    mean = weight.abs().sum() / (24 * 80)
    assert torch.equal(found.sign(), weight.sign())
    torch.testing.assert_close(found.abs(), torch.full_like(weight, mean), rtol=1e-3, atol=0)
    # Ours has a scale per group, which is closer where columns differ in size.
    ours = dequantize(quantize(weight, 1, group=32))
    assert (ours - weight).norm() < 0.9 * (found - weight).norm()


def test_zeros_stay_zeros_and_what_is_not_finite_is_refused() -> None:
    assert not dequantize(quantize_signs(torch.zeros(8, 32), group=32)).any()
    with pytest.raises(CorruptArtifactError, match="NaN"):
        quantize_signs(torch.full((8, 32), torch.nan), group=32)
