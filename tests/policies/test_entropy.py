"""The token activating entropy, by hand."""

import numpy as np
import pytest

from moe_tool.policies.misses.gates import token_activating_entropy


def test_even_weights_have_entropy_one() -> None:
    even = np.array([[0.5, 0.5], [0.1, 0.1]], np.float32)
    np.testing.assert_allclose(token_activating_entropy(even), [1.0, 1.0], rtol=1e-12)
    assert token_activating_entropy(np.full((1, 8), 0.3, np.float16)).max() <= 1.0


def test_all_the_weight_on_one_expert_has_entropy_zero() -> None:
    peaked = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 3.0]], np.float32)
    assert token_activating_entropy(peaked).tolist() == [0.0, 0.0]


def test_three_quarters_against_one_quarter() -> None:
    # -(3/4 log2 3/4 + 1/4 log2 1/4) = 2 - 3/4 log2 3 = 0.811278
    found = token_activating_entropy(np.array([[0.75, 0.25], [3.0, 1.0]]))
    np.testing.assert_allclose(found, [0.8112781, 0.8112781], rtol=1e-7)


@pytest.mark.parametrize("weights", [np.ones((3, 1)), np.zeros((3, 2)), np.zeros((3, 1))])
def test_nothing_to_spread_is_zero(weights: np.ndarray) -> None:
    assert token_activating_entropy(weights).tolist() == [0.0, 0.0, 0.0]


def test_no_tokens_have_no_entropies() -> None:
    assert token_activating_entropy(np.zeros((0, 2))).shape == (0,)
