"""Clusters of experts by hand; the library is only asked for what we rely on."""

import numpy as np

from moe_tool.buddies.clusters import cluster_experts


def test_the_most_alike_are_together_and_numbered_by_their_first_member() -> None:
    similarity = np.full((4, 4), 0.1)
    similarity[0, 3] = similarity[3, 0] = 0.9
    similarity[1, 2] = similarity[2, 1] = 0.8
    assert cluster_experts(similarity) == (0, 1, 1, 0)


def test_both_directions_of_an_asymmetric_similarity_count() -> None:
    similarity = np.zeros((4, 4))
    similarity[0, 1] = 0.9  # 0.45 on average
    similarity[0, 2] = similarity[2, 0] = 0.6
    similarity[1, 3] = similarity[3, 1] = 0.6
    assert cluster_experts(similarity) == (0, 1, 0, 1)


def test_linkage_is_average() -> None:
    # 0-1 merge at 0.1, 2-3 at 0.2 and 4-5 at 0.25: three clusters of two.
    distance = np.ones((6, 6))
    for one, other, gap in ((0, 1, 0.1), (2, 3, 0.2), (4, 5, 0.25), (1, 2, 0.3), (0, 2, 0.9)):
        distance[one, other] = distance[other, one] = gap
    assert cluster_experts(1 - distance) == (0, 0, 1, 1, 2, 2)


def test_two_or_three_experts_are_one_cluster() -> None:
    assert cluster_experts(np.eye(2)) == (0, 0)
    assert cluster_experts(np.eye(3)) == (0, 0, 0)


def test_experts_that_are_all_different_still_make_half_as_many_clusters() -> None:
    labels = cluster_experts(np.eye(8))
    assert len(set(labels)) == 4 and labels[0] == 0
    assert labels == cluster_experts(np.eye(8))
