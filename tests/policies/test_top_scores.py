"""Experts that are read ahead: those that score clearly above the cut."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moe_tool.policies.prefetch import keep_top_scores


def test_near_ties_are_left_out():
    share = np.array([[0.4, 0.3, 0.2, 0.1], [0.3, 0.25, 0.24, 0.21]])
    index = np.array([[0, 1], [1, 0]])
    assert keep_top_scores(index, share, alpha=0).tolist() == [[0, 1], [1, 0]]
    assert keep_top_scores(index, share, alpha=0.2).tolist() == [[0, 1], [-1, 0]]
    assert keep_top_scores(index, share, alpha=0.6).tolist() == [[0, -1], [-1, -1]]


def test_no_expert_stays_none():
    share = np.array([[0.3, 0.6, 0.1]])
    assert keep_top_scores(np.array([[1, 3]]), share, alpha=0.5).tolist() == [[1, -1]]
    assert keep_top_scores(np.array([[-1, 3]]), share, alpha=0).tolist() == [[-1, -1]]


@given(seed=st.integers(0, 999), alphas=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_wider_band_leaves_fewer(seed, alphas):
    share = np.random.default_rng(seed).dirichlet(np.ones(8), size=5)
    index = np.argsort(-share, axis=1)[:, :3]
    assert (keep_top_scores(index, share, alpha=0) == index).all()
    wide = keep_top_scores(index, share, alpha=max(alphas)) >= 0
    assert not (wide & (keep_top_scores(index, share, alpha=min(alphas)) < 0)).any()
