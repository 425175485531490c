"""Experts that neighbouring tokens touch together: by hand, and window by window."""

import numpy as np
import pytest

from moe_tool.artifacts.routing_report import UnionGrowth
from moe_tool.profiling.union_growth import WINDOWS, mean_union_growth, union_growth


def window_by_window(top_k_index: np.ndarray, length: int) -> float | None:
    sizes = [
        len(set(sequence[start : start + length].reshape(-1).tolist()))
        for sequence in top_k_index
        for start in range(len(sequence) - length + 1)
    ]
    return None if not sizes else sum(sizes) / len(sizes) / top_k_index.shape[2]


def routing(seed: int) -> tuple[np.ndarray, int]:
    random = np.random.default_rng(seed)
    n_experts = int(random.integers(1, 12))
    n, s, k = random.integers(1, 5), random.integers(2, 14), random.integers(1, n_experts + 1)
    scores = random.random((n, s, n_experts)) ** random.integers(1, 4)
    scores[..., : n_experts // 2] += 0.3  # some experts are hot
    return np.argsort(-scores, axis=2)[..., :k].astype(np.uint16), n_experts


def test_by_hand() -> None:
    # Two sequences of three tokens with one expert each.
    index = np.array([[[0], [0], [1]], [[2], [1], [2]]])
    found = union_growth(index, n_experts=4)
    assert found.n_tokens == WINDOWS == (1, 2, 3, 4, 5, 6, 7, 8)
    # Pairs: 1, 2, 2, 2. Triples: 2, 2.
    assert found.measured == (1.0, 7 / 4, 2.0, None, None, None, None, None)
    assert found.by_chance[0] == 1.0
    assert found.by_chance[1] == pytest.approx(1 + 3 / 4)
    assert found.by_chance[2] == pytest.approx(1 + 3 / 4 + 9 / 16)


@pytest.mark.parametrize("seed", range(40))
def test_it_is_the_mean_over_all_windows(seed: int) -> None:
    index, n_experts = routing(seed)
    found = union_growth(index, n_experts=n_experts)
    for length, measured in zip(WINDOWS, found.measured, strict=True):
        wanted = window_by_window(index, length)
        assert measured == (None if wanted is None else pytest.approx(wanted, rel=1e-12))


def test_sequences_are_kept_apart() -> None:
    together = union_growth(np.array([[[0], [1], [0], [1]]]), n_experts=2)
    apart = union_growth(np.array([[[0], [1]], [[0], [1]]]), n_experts=2)
    assert together.measured[2] == 2.0 and apart.measured[2] is None


def test_all_experts_at_every_token_do_not_grow() -> None:
    found = union_growth(np.tile(np.arange(3), (2, 9, 1)), n_experts=3)
    assert found.measured == (1.0,) * 8
    assert found.by_chance == pytest.approx((1.0,) * 8)


def test_no_sequences_are_none() -> None:
    assert union_growth(np.zeros((0, 4, 2), np.uint16), n_experts=4).measured == (None,) * 8


def test_independent_uniform_choices_grow_by_chance() -> None:
    random = np.random.default_rng(0)
    index = np.argsort(random.random((40, 256, 16)), axis=2)[..., :2]
    found = union_growth(index, n_experts=16)
    # 10 240 windows that overlap: a standard error of about 0.005.
    assert found.measured == pytest.approx(found.by_chance, abs=0.03)


def test_the_mean_over_layers_passes_over_what_is_not_known() -> None:
    def layer(*measured: float | None) -> UnionGrowth:
        return UnionGrowth(n_tokens=(1, 2), measured=measured, by_chance=(1.0, 1.5))

    assert mean_union_growth([layer(1.0, None), layer(1.0, 1.5)]).measured == (1.0, 1.5)
    assert mean_union_growth([layer(1.0, None)]).measured == (1.0, None)
    assert mean_union_growth([layer(1.0, 1.25), layer(1.0, 1.75)]).measured == (1.0, 1.5)
