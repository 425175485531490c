"""Intervals resample whole sequences."""

import itertools

import numpy as np
import pytest

from moe_tool.evaluation.bootstrap import bootstrap_interval
from moe_tool.evaluation.figures import means


def test_one_sequence_has_no_interval() -> None:
    assert bootstrap_interval(np.zeros((1, 50)), means, seed=0) is None


def test_equal_sequences_have_an_interval_of_no_width() -> None:
    values = np.tile([1.0, 5.0, 9.0], (4, 1))
    assert bootstrap_interval(values, means, seed=0) == (5.0, 5.0)


def test_two_sequences_resample_to_their_three_possiblemeanss() -> None:
    """Means 0, 1/2, 1 come with probability 1/4, 1/2, 1/4, so both 2.5 % tails lie on the
    extremes."""
    values = np.array([[0.0, 0.0], [1.0, 1.0]])
    assert bootstrap_interval(values, means, seed=3) == (0.0, 1.0)


def test_the_interval_agrees_with_all_resamples_enumerated() -> None:
    rows = np.array([[0.0], [1.0], [4.0], [9.0]])
    every = [rows[list(draw)].mean() for draw in itertools.product(range(4), repeat=4)]
    low, high = np.percentile(every, (2.5, 97.5))
    found = bootstrap_interval(rows, means, seed=0, n_resamples=20_000)
    assert found == pytest.approx((low, high), abs=0.26)  # the means lie on a grid of 1/4


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(0).normal(size=(8, 3))
    first = bootstrap_interval(values, means, seed=7)
    assert first == bootstrap_interval(values, means, seed=7)
    assert first != bootstrap_interval(values, means, seed=8)


@pytest.mark.parametrize("shape", [(8, 3), (5, 1), (4, 70_000)])
def test_many_resamples_at_once_are_those_of_one_by_one(shape: tuple[int, int]) -> None:
    values = np.random.default_rng(1).exponential(size=shape)
    draws = np.random.default_rng(2).integers(len(values), size=(40, len(values)))
    by_hand = np.percentile([values[draw].mean() for draw in draws], (2.5, 97.5))
    assert bootstrap_interval(values, means, seed=2, n_resamples=40) == pytest.approx(by_hand)
