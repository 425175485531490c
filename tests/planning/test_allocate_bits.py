"""The choice of bits: both solvers against every combination, and against each other."""

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_tool.planning import allocate_bits
from moe_tool.planning.allocate_bits import allocate, allocate_by_layer, by_rank, spread_evenly

SOLVERS = (allocate_bits._by_dynamic_program, allocate_bits._by_integer_program)


def _best_of_all(cost: np.ndarray, size: np.ndarray, room: int) -> float:
    row = np.arange(len(cost))
    best = np.inf
    for choice in product(range(cost.shape[1]), repeat=len(cost)):
        picked = np.array(choice)
        if size[row, picked].sum() <= room:
            best = min(best, float(cost[row, picked].sum()))
    return best


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 5), n_choices=st.integers(1, 4))
def test_both_find_the_best_of_all_combinations(seed: int, n: int, n_choices: int) -> None:
    rng = np.random.default_rng(seed)
    cost = rng.uniform(0, 1, (n, n_choices))
    cost[rng.uniform(size=cost.shape) < 0.1] = np.inf
    size = rng.integers(0, 9, (n, n_choices))
    room = int(rng.integers(0, 8 * n + 1))
    expected = _best_of_all(cost, size, room)
    row = np.arange(n)
    for solve in SOLVERS:
        found = solve(cost, size, room)
        if not np.isfinite(expected):
            assert found is None
            continue
        assert found is not None
        assert size[row, found].sum() <= room
        assert cost[row, found].sum() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("solve", SOLVERS)
def test_no_room_at_all_ends(solve: Callable[..., np.ndarray | None]) -> None:
    cost = np.array([[0.1, 0.2], [0.3, 0.4]])
    assert solve(cost, np.array([[1, 2], [0, 1]]), 0) is None
    found = solve(cost, np.array([[1, 0], [0, 1]]), 0)
    assert found is not None and found.tolist() == [1, 0]


@pytest.mark.parametrize("bits", [1.5, 2.0, 2.5, 3.0])
def test_both_agree_on_96_experts(bits: float) -> None:
    rng = np.random.default_rng(1)
    widths = np.array([1, 2, 3, 4, 8])
    cost = rng.uniform(0.1, 10, (96, 1)) * np.array([0.14, 0.03, 0.006, 0.0015, 1e-5])
    size = np.tile(widths, (96, 1))
    room = int(bits * 96)
    found = [solve(cost, size, room) for solve in SOLVERS]
    row = np.arange(96)
    sums = [float(cost[row, choice].sum()) for choice in found]
    assert sums[0] == pytest.approx(sums[1], rel=1e-6)
    assert all(size[row, choice].sum() <= room for choice in found)
    uniform = spread_evenly(96, int(bits) - 1, int(bits), bits - int(bits))
    assert sums[0] < float(cost[row, uniform].sum())


def test_bytes_are_kept_whatever_the_solver_tolerates(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    size = np.cumsum(rng.integers(4096, 10**9, (64, 5)), axis=1)
    cost = np.cumsum(rng.uniform(0, 1, (64, 5)), axis=1)[:, ::-1]
    row = np.arange(64)
    for room in (int(size[:, 2].sum()), int(size[:, 1].sum()) + 1):
        found = allocate(cost, size, room)
        assert found is not None and size[row, found].sum() <= room


def test_all_layers_at_once_are_never_worse_than_one_by_one() -> None:
    rng = np.random.default_rng(5)
    eps = np.array([0.14, 0.03, 0.006, 0.0015])
    cost = rng.lognormal(0, 1.5, (6, 16, 1)) * eps
    size = np.tile(np.array([1, 2, 3, 4]), (6, 16, 1))
    one_by_one = allocate_by_layer(cost, size, 2 * 96)
    at_once = allocate(cost.reshape(96, 4), size.reshape(96, 4), 2 * 96)
    assert one_by_one is not None and at_once is not None
    row = np.arange(96)

    def total(chosen: np.ndarray) -> float:
        return float(cost.reshape(96, 4)[row, chosen.ravel()].sum())

    assert total(at_once) < total(one_by_one)
    assert (np.take_along_axis(size, one_by_one[..., None], 2).sum(axis=(1, 2)) <= 32).all()


def test_too_little_room_is_none() -> None:
    cost, size = np.ones((3, 2)), np.full((3, 2), 4)
    assert allocate(cost, size, 11) is None
    assert allocate_by_layer(cost[None], size[None], 11) is None


def test_controls_keep_their_share() -> None:
    assert spread_evenly(8, 2, 3, 0.5).tolist() == [2, 3] * 4
    assert spread_evenly(5, 1, 2, 0.0).tolist() == [1] * 5
    assert by_rank([2, 0, 1, 3], 1, 2, 0.5).tolist() == [2, 1, 2, 1]
