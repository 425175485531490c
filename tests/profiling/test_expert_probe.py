"""Prices and scales: by hand, against a brute force over tokens, and at the edges."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_tool.artifacts.expert_statistics import ProbeStatistics
from moe_tool.errors import CorruptArtifactError
from moe_tool.profiling.expert_probe import (
    CKA_TOKENS,
    MIN_ROUTED_TOKENS,
    ExpertProbe,
    bits_price,
    probe_blocks,
)
from moe_tool.profiling.similarity import linear_cka, token_cosines, token_grams


def probe(outputs: torch.Tensor, gate: np.ndarray, *, memory_bytes: int = 2**30) -> ExpertProbe:
    n_experts, n_tokens, hidden = outputs.shape
    fed = ExpertProbe(n_experts=n_experts)
    for block in probe_blocks(
        n_tokens, n_experts=n_experts, hidden=hidden, memory_bytes=memory_bytes
    ):
        fed.add_block(outputs[:, block], routed=gate[block] > 0, gate=gate[block])
    return fed


def random_sample(
    n_experts: int, n_tokens: int, hidden: int, *, top_k: int = 2, seed: int = 0
) -> tuple[torch.Tensor, np.ndarray]:
    """Outputs [E, n, H] that share a part, and gate weights [n, E] that sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(n_tokens, hidden, generator=generator)
    outputs = shared + torch.randn(n_experts, n_tokens, hidden, generator=generator)
    gate = np.zeros((n_tokens, n_experts), np.float32)
    chosen = torch.rand(n_tokens, n_experts, generator=generator).argsort(dim=1)[:, :top_k]
    np.put_along_axis(gate, chosen.numpy(), np.float32(1 / top_k), axis=1)
    return outputs, gate


def repeat(values: list[list[float]], times: int) -> torch.Tensor:
    """Tokens repeated until an expert has enough of them."""
    return torch.tensor(values * times)


def brute_force(outputs: torch.Tensor, gate: np.ndarray) -> dict[str, np.ndarray]:
    """Every figure token by token in float64, over routed tokens (all where too few)."""
    exact = outputs.double().numpy()
    n_experts, n_tokens, _ = exact.shape
    scale, price = np.zeros((n_experts, n_experts)), np.zeros((n_experts, n_experts))
    norm, ratio = np.zeros(n_experts), np.zeros(n_experts)
    layer = np.einsum("te,eth->th", gate.astype(np.float64), exact)
    for i in range(n_experts):
        rows = np.flatnonzero(gate[:, i] > 0)
        if len(rows) < MIN_ROUTED_TOKENS:
            rows = np.arange(n_tokens)
        own = exact[i, rows]
        norm[i] = np.sqrt((own**2).sum(axis=1).mean())
        ratio[i] = norm[i] / np.sqrt((layer[rows] ** 2).sum(axis=1).mean())
        for j in range(n_experts):
            other = exact[j, rows].reshape(-1)
            scale[i, j] = np.linalg.lstsq(other[:, None], own.reshape(-1), rcond=None)[0][0]
            residual = own.reshape(-1) - scale[i, j] * other
            price[i, j] = np.linalg.norm(residual) / np.linalg.norm(own)
    return {"scale": scale, "eps_buddy": price, "output_norm": norm, "output_ratio": ratio}


def test_scale_and_price_of_two_experts_by_hand() -> None:
    # On every token E_0 = (3, 4) and E_1 = (5, 0): <E_0, E_1> = 15, ||E_0||^2 = ||E_1||^2 = 25.
    outputs = torch.stack([repeat([[3.0, 4.0]], 10), repeat([[5.0, 0.0]], 10)])
    gate = np.full((10, 2), 0.5, np.float32)
    found = probe(outputs, gate).finish()
    np.testing.assert_allclose(found.scale, [[1.0, 0.6], [0.6, 1.0]], atol=1e-6)
    np.testing.assert_allclose(found.eps_buddy, [[0.0, 0.8], [0.8, 0.0]], atol=1e-6)
    np.testing.assert_allclose(found.cosine, [[1.0, 0.6], [0.6, 1.0]], atol=1e-6)
    np.testing.assert_allclose(found.output_norm, [5.0, 5.0], atol=1e-6)
    # The layer puts out (4, 2), of norm sqrt 20.
    np.testing.assert_allclose(found.output_ratio, [5 / 20**0.5] * 2, atol=1e-6)
    assert found.eps_drop.tolist() == [1.0, 1.0]
    assert found.n_sampled == found.n_cka == 10
    assert found.n_routed.tolist() == [10, 10]
    assert not found.fell_back.any()


def test_an_expert_is_measured_on_the_tokens_that_were_routed_to_it() -> None:
    # E_1 = E_0 on the first half, which goes to expert 0; -2 E_0 on the second, which goes to 1.
    own = repeat([[1.0, 1.0]], 16)
    sign = torch.tensor([1.0] * 8 + [-2.0] * 8)[:, None]
    gate = np.zeros((16, 2), np.float32)
    gate[:8, 0] = gate[8:, 1] = 1.0
    found = probe(torch.stack([own, own * sign]), gate).finish()
    np.testing.assert_allclose(found.scale, [[1.0, 1.0], [-2.0, 1.0]], atol=1e-6)
    np.testing.assert_allclose(found.eps_buddy, np.zeros((2, 2)), atol=1e-3)
    np.testing.assert_allclose(found.output_norm, [2**0.5, 8**0.5], rtol=1e-6)
    np.testing.assert_allclose(found.output_ratio, [1.0, 1.0], rtol=1e-6)


@pytest.mark.parametrize("block_tokens", [1, 7, 1000])
def test_everything_equals_a_brute_force_over_tokens(block_tokens: int) -> None:
    outputs, gate = random_sample(5, 90, 6)
    gate[:, 4] = 0
    gate[:3, 4] = 0.5  # too few: falls back
    memory_bytes = block_tokens * 5 * 6 * 4
    found = probe(outputs, gate, memory_bytes=memory_bytes).finish()
    expected = brute_force(outputs, gate)
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(found, name), values, atol=3e-4, err_msg=name)
    np.testing.assert_allclose(
        found.cosine, token_cosines(token_grams(outputs)).mean(dim=0), atol=1e-6
    )
    assert found.fell_back.tolist() == [False] * 4 + [True]
    assert found.n_routed.tolist() == (gate > 0).sum(axis=0).tolist()


@settings(max_examples=40, deadline=None)
@given(
    n_experts=st.integers(2, 4),
    n_tokens=st.integers(1, 40),
    hidden=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_any_small_sample_equals_the_brute_force(
    n_experts: int, n_tokens: int, hidden: int, seed: int
) -> None:
    outputs, gate = random_sample(n_experts, n_tokens, hidden, seed=seed)
    found = probe(outputs, gate).finish()
    expected = brute_force(outputs, gate)
    # Near a perfect stand-in the square root magnifies the rounding of the squares.
    np.testing.assert_allclose(found.eps_buddy, expected["eps_buddy"], atol=2e-3)
    np.testing.assert_allclose(found.scale, expected["scale"], rtol=1e-3, atol=1e-4)
    assert found.eps_buddy.max() <= 1.0 + 1e-6


def test_cka_is_that_of_the_first_block_spread_over_the_sample() -> None:
    outputs, gate = random_sample(4, 1000, 3)
    whole = probe(outputs, gate).finish()
    assert whole.n_cka == 250 <= CKA_TOKENS
    np.testing.assert_allclose(whole.cka, linear_cka(outputs[:, ::4]), atol=1e-6)
    # Room for 100 tokens: ten blocks, every tenth token in the first.
    small = probe(outputs, gate, memory_bytes=100 * 4 * 3 * 4).finish()
    assert small.n_cka == 100
    np.testing.assert_allclose(small.cka, linear_cka(outputs[:, ::10]), atol=1e-6)


def test_blocks_hold_every_token_once_and_fit_the_memory() -> None:
    blocks = probe_blocks(103, n_experts=4, hidden=8, memory_bytes=10 * 4 * 8 * 4 + 5)
    rows = [list(range(103))[block] for block in blocks]
    assert sorted(row for block in rows for row in block) == list(range(103))
    assert max(len(block) for block in rows) == 10 and len(blocks) == 11
    assert probe_blocks(3, n_experts=4, hidden=8, memory_bytes=1) == (
        slice(0, 3, 3),
        slice(1, 3, 3),
        slice(2, 3, 3),
    )
    assert probe_blocks(0, n_experts=4, hidden=8, memory_bytes=1) == ()


def test_a_scale_fitted_elsewhere_is_priced_by_hand() -> None:
    outputs = torch.stack([repeat([[3.0, 4.0]], 10), repeat([[5.0, 0.0]], 10)])
    held_out = probe(outputs, np.full((10, 2), 0.5, np.float32))
    price = held_out.price_of_scales(np.array([[1.0, 1.0], [-1.0, 1.0]], np.float32))
    # ||(3, 4) - (5, 0)|| = sqrt 20; ||(5, 0) + (3, 4)|| = sqrt 80: worse than nothing.
    np.testing.assert_allclose(price, [[0.0, 20**0.5 / 5], [80**0.5 / 5, 0.0]], atol=1e-6)


def test_no_scale_is_cheaper_than_the_one_fitted_on_the_same_tokens() -> None:
    fed = probe(*random_sample(4, 60, 5))
    best = fed.finish()
    np.testing.assert_array_equal(
        fed.price_of_scales(best.scale)[~np.eye(4, dtype=bool)],
        best.eps_buddy[~np.eye(4, dtype=bool)],
    )
    for factor in (0.9, 1.1):
        worse = fed.price_of_scales(best.scale * np.float32(factor))
        assert (worse >= best.eps_buddy).all()


def test_a_zero_expert_costs_nothing_and_is_no_stand_in() -> None:
    outputs, gate = random_sample(3, 40, 4)
    outputs[1] = 0.0
    found = probe(outputs, gate).finish()
    assert_finite(found)
    assert found.eps_buddy[1].tolist() == [0.0, 0.0, 0.0]
    assert found.eps_drop.tolist() == [1.0, 0.0, 1.0]
    assert found.scale[:, 1].tolist() == [0.0, 0.0, 0.0]
    assert found.eps_buddy[0, 1] == found.eps_buddy[2, 1] == 1.0
    assert found.output_norm[1] == found.output_ratio[1] == 0.0


def test_a_scale_on_an_expert_that_is_zero_here_is_as_bad_as_nothing() -> None:
    outputs, gate = random_sample(2, 40, 4)
    outputs[0] = 0.0
    price = probe(outputs, gate).price_of_scales(np.array([[1, 0.5], [0.5, 1]], np.float32))
    assert price[0, 1] == 1.0 and price[0, 0] == 0.0


def test_all_experts_zero_is_finite() -> None:
    found = probe(torch.zeros(2, 20, 4), np.full((20, 2), 0.5, np.float32)).finish()
    assert_finite(found)
    assert found.eps_buddy.max() == found.eps_drop.max() == 0.0


def test_an_expert_that_was_never_chosen_falls_back_to_all_tokens() -> None:
    outputs, gate = random_sample(3, 40, 4, top_k=1)
    gate[:, 2] = 0.0
    found = probe(outputs, gate).finish()
    assert_finite(found)
    assert found.fell_back[2] and found.n_routed[2] == 0
    expected = outputs[2].square().sum(dim=1).mean().sqrt()
    np.testing.assert_allclose(found.output_norm[2], expected, rtol=1e-5)


def test_no_tokens_price_everything_as_nothing() -> None:
    empty = ExpertProbe(n_experts=2)
    empty.add_block(
        torch.zeros(2, 0, 4), routed=np.zeros((0, 2), bool), gate=np.zeros((0, 2), np.float32)
    )
    found = empty.finish()
    assert_finite(found)
    assert found.n_sampled == found.n_cka == 0 and found.fell_back.all()
    assert found.eps_buddy.min() == found.eps_drop.min() == 1.0
    assert empty.price_of_scales(np.ones((2, 2), np.float32)).min() == 1.0


def test_identical_experts_stand_in_for_each_other_for_free() -> None:
    outputs, gate = random_sample(2, 64, 16)
    outputs[1] = outputs[0]
    found = probe(outputs, gate).finish()
    assert found.eps_buddy.max() < 1e-3
    np.testing.assert_allclose(found.scale, np.ones((2, 2)), rtol=1e-6)


def test_outputs_that_are_not_finite_are_refused_by_expert() -> None:
    outputs, gate = random_sample(3, 20, 4)
    outputs[1, 5, 2] = float("inf")
    with pytest.raises(CorruptArtifactError, match="expert 1"):
        probe(outputs, gate).finish()


def test_bits_price_by_hand() -> None:
    exact = torch.tensor([[3.0, 4.0]])
    off_by_one = exact + torch.tensor([[1.0, 0.0]])
    outputs = {8: exact, 4: off_by_one, 3: exact * 2, 2: exact * 0, 1: -exact}
    np.testing.assert_allclose(bits_price(exact, outputs), [0.0, 0.2, 1.0, 1.0, 2.0], rtol=1e-6)


def test_bits_price_of_a_zero_expert_and_of_no_tokens() -> None:
    zero = torch.zeros(2, 3)
    widths = dict.fromkeys((8, 4, 3, 2, 1), zero)
    assert bits_price(zero, widths).tolist() == [0.0] * 5
    assert bits_price(zero, widths | {1: zero + 1}).tolist() == [0.0, 0.0, 0.0, 0.0, 1.0]
    nothing = torch.zeros(0, 3)
    assert bits_price(nothing, dict.fromkeys(widths, nothing)).tolist() == [1.0] * 5


def assert_finite(statistics: ProbeStatistics) -> None:
    for field in dataclasses.fields(statistics):
        assert np.isfinite(getattr(statistics, field.name)).all(), field.name
