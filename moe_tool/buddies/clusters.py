"""Clusters of similar experts: average-linkage agglomerative clustering of 1 - similarity."""

import numpy as np


def cluster_experts(similarity: np.ndarray) -> tuple[int, ...]:
    """Return the cluster of each expert, E labels numbered by their first member.

    The number of clusters is max(1, E // 2) for any measure, since distances of different measures
    are not comparable. An asymmetric similarity is averaged over both directions.

    Args:
        similarity: [E, E] float, higher is more similar; the diagonal is ignored.
    """
    n_experts = len(similarity)
    n_clusters = max(1, n_experts // 2)
    if n_clusters == 1:
        return (0,) * n_experts
    # sklearn takes a second to import.
    from sklearn.cluster import AgglomerativeClustering

    distance = 1.0 - similarity.astype(np.float64)
    distance = (distance + distance.T) / 2
    np.fill_diagonal(distance, 0.0)
    found = AgglomerativeClustering(
        n_clusters=n_clusters, metric="precomputed", linkage="average"
    ).fit_predict(distance)
    number: dict[int, int] = {}
    return tuple(number.setdefault(int(label), len(number)) for label in found)
