"""Measures of likeness: by hand, against the definitions in other forms, and at the edges."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_tool.profiling.similarity import (
    coactivation,
    linear_cka,
    router_similarity,
    token_cosines,
    token_grams,
)


def cka_in_features(outputs: torch.Tensor) -> np.ndarray:
    """The definition: ||Yc_i^T Yc_j||^2 / (||Yc_i^T Yc_i|| ||Yc_j^T Yc_j||), in float64."""
    centred = (outputs.double() - outputs.double().mean(dim=1, keepdim=True)).numpy()
    cross = np.array(
        [[np.linalg.norm(left.T @ right) ** 2 for right in centred] for left in centred]
    )
    own = np.sqrt(np.diag(cross))
    return cross / np.outer(own, own)


def random_outputs(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mean_cosine(outputs: torch.Tensor) -> np.ndarray:
    return token_cosines(token_grams(outputs)).mean(dim=0).numpy()


def test_cosine_of_two_experts_on_two_tokens_by_hand() -> None:
    outputs = torch.tensor([[[1.0, 0.0], [3.0, 4.0]], [[0.0, 2.0], [6.0, 8.0]]])
    # Orthogonal on the first token, parallel on the second.
    np.testing.assert_allclose(mean_cosine(outputs), [[1.0, 0.5], [0.5, 1.0]], atol=1e-6)


def test_cosine_keeps_its_sign_but_not_the_size() -> None:
    outputs = torch.tensor([[[1.0, 2.0]], [[-10.0, -20.0]]])
    np.testing.assert_allclose(mean_cosine(outputs), [[1.0, -1.0], [-1.0, 1.0]], atol=1e-6)


def test_cosine_beside_a_zero_output_is_zero() -> None:
    outputs = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
    np.testing.assert_allclose(mean_cosine(outputs), [[0.0, 0.0], [0.0, 1.0]], atol=1e-6)


def test_cka_of_two_experts_on_three_tokens_by_hand() -> None:
    # Centred: (-1, 0, 1), (-1, 2, -1) and (0, -1, 1).
    straight, bent, shifted = [1.0, 2.0, 3.0], [0.0, 3.0, 0.0], [5.0, 4.0, 6.0]
    outputs = torch.tensor([straight, bent, shifted])[:, :, None]
    # One feature: CKA is the squared correlation. straight/shifted: (1 / (sqrt 2 sqrt 2))^2 = 1/4;
    # bent/shifted: (-3 / (sqrt 6 sqrt 2))^2 = 3/4.
    expected = [[1.0, 0.0, 0.25], [0.0, 1.0, 0.75], [0.25, 0.75, 1.0]]
    np.testing.assert_allclose(linear_cka(outputs), expected, atol=1e-6)


@pytest.mark.parametrize(("n_tokens", "hidden"), [(40, 6), (6, 40), (2, 3)])
def test_cka_in_kernels_equals_cka_in_features(n_tokens: int, hidden: int) -> None:
    outputs = random_outputs(5, n_tokens, hidden)
    outputs[1] += 0.5 * outputs[0] + 3.0
    np.testing.assert_allclose(linear_cka(outputs), cka_in_features(outputs), atol=2e-5)


def test_cka_does_not_see_rotation_scale_and_shift() -> None:
    first = random_outputs(50, 8)
    rotation = torch.linalg.qr(random_outputs(8, 8, seed=1))[0]
    outputs = torch.stack([first, -7.0 * first @ rotation + 2.0])
    np.testing.assert_allclose(linear_cka(outputs), np.ones((2, 2)), atol=1e-4)


def test_cka_of_a_constant_expert_is_zero_beside_the_others() -> None:
    outputs = random_outputs(3, 30, 4)
    outputs[1] = 0.1
    outputs[2] = 0.0
    np.testing.assert_array_equal(linear_cka(outputs), np.eye(3))


def test_cka_of_one_token_is_defined() -> None:
    np.testing.assert_array_equal(linear_cka(random_outputs(2, 1, 4)), np.eye(2))


def test_cka_is_the_same_for_tiny_and_huge_outputs() -> None:
    outputs = random_outputs(3, 20, 4)
    stretched = outputs * torch.tensor([1e-15, 1.0, 1e15])[:, None, None]
    np.testing.assert_allclose(linear_cka(stretched), linear_cka(outputs), atol=1e-5)


def test_router_similarity_by_hand() -> None:
    logits = np.array([[1, 2, -1, 5], [2, 4, -2, 5], [3, 6, -3, 5]], np.float16)
    expected = [[1, 1, -1, 0], [1, 1, -1, 0], [-1, -1, 1, 0], [0, 0, 0, 1]]
    np.testing.assert_allclose(router_similarity(logits), expected, atol=1e-6)


def test_router_similarity_equals_numpys_correlation_over_several_chunks() -> None:
    logits = np.random.default_rng(0).normal(3.0, 2.0, (20_000, 5)).astype(np.float16)
    logits[:, 3] += logits[:, 0]
    expected = np.corrcoef(logits.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(router_similarity(logits), expected, atol=1e-5)


def test_router_similarity_without_tokens_is_the_identity() -> None:
    np.testing.assert_array_equal(router_similarity(np.zeros((0, 3), np.float16)), np.eye(3))


def test_coactivation_by_hand() -> None:
    index = np.array([[0, 1], [1, 0], [2, 1]], np.uint16)
    expected = [[2, 2, 0, 0], [2, 3, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(coactivation(index, 4), expected)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_coactivation_equals_counting_token_by_token(data: st.DataObject) -> None:
    n_experts = data.draw(st.integers(1, 6))
    top_k = data.draw(st.integers(1, n_experts))
    tokens = data.draw(st.lists(st.permutations(range(n_experts)), max_size=12))
    index = np.array([token[:top_k] for token in tokens], np.uint16).reshape(-1, top_k)
    expected = np.zeros((n_experts, n_experts), np.int64)
    for row in index.tolist():
        for one in row:
            for other in row:
                expected[one, other] += 1
    np.testing.assert_array_equal(coactivation(index, n_experts), expected)
