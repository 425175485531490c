"""The fit of time per token to a policy's strength."""

import math

import pytest

from benchmarks.time_fit import fit_times
from moe_tool.errors import UsageError

ALPHAS = [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]


def test_a_polynomial_is_found_and_the_weakest_setting_within_a_limit():
    fit = fit_times(ALPHAS, [10 - 8 * a + 2 * a * a for a in ALPHAS])
    assert fit.coefficients == pytest.approx((2, -8, 10))
    assert fit.residuals == pytest.approx([0] * 7, abs=1e-9)
    found = fit.weakest_within(8.02)
    assert found == pytest.approx(0.2655, abs=0.01)
    assert fit.time_at(found) <= 8.02 < fit.time_at(found - 0.001)
    assert fit.weakest_within(20) == 0
    assert fit.weakest_within(1) is None


def test_noise_is_in_the_residuals():
    fit = fit_times([0, 0.5, 1], [1, 2, 1], degree=1)
    assert fit.residuals == pytest.approx((-1 / 3, 2 / 3, -1 / 3))


@pytest.mark.parametrize(
    ("alphas", "times"),
    [([0, 0.1], [1, 2]), ([0.1] * 5, [1] * 5), ([0, 1, 2], [1, math.nan, 2]), ([0, 1, 2], [1])],
)
def test_too_few_settings_are_refused(alphas, times):
    with pytest.raises(UsageError):
        fit_times(alphas, times)
