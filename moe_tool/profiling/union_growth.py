"""Distinct experts that consecutive tokens choose together, e.g. the tokens of a draft."""

from collections.abc import Sequence

import numpy as np

from moe_tool.artifacts.routing_report import UnionGrowth, mean_of_known

WINDOWS = tuple(range(1, 9))
"""Numbers n of consecutive tokens."""


def union_growth(top_k_index: np.ndarray, *, n_experts: int) -> UnionGrowth:
    """Return the mean number of distinct experts in windows of tokens, over K, of one layer.

    An expert counts once per window, at its first use there; a use is the first in a window if the
    expert's previous use lies before the window.

    Args:
        top_k_index: [n, S, K] integers below `n_experts`, distinct for each token.
    """
    n_sequences, seq_len, top_k = top_k_index.shape
    position, gap = _gaps(top_k_index, n_experts)
    missed = 1 - top_k / n_experts  # chance that a token does not choose an expert
    measured: list[float | None] = []
    for length in WINDOWS:
        n_windows = n_sequences * (seq_len - length + 1)
        if n_windows <= 0:
            measured.append(None)
            continue
        # Windows that start at `first` to `last` contain this use as the first of its expert.
        first = np.maximum(position - np.minimum(length, gap) + 1, 0)
        last = np.minimum(position, seq_len - length)
        n_first_uses = int(np.maximum(last - first + 1, 0).sum())
        measured.append(n_first_uses / n_windows / top_k)
    return UnionGrowth(
        n_tokens=WINDOWS,
        measured=tuple(measured),
        by_chance=tuple(n_experts * (1 - missed**length) / top_k for length in WINDOWS),
    )


def mean_union_growth(layers: Sequence[UnionGrowth]) -> UnionGrowth:
    """Return the mean over one or more layers."""
    columns = zip(*(layer.measured for layer in layers), strict=True)
    return UnionGrowth(
        n_tokens=layers[0].n_tokens,
        measured=tuple(mean_of_known(column) for column in columns),
        by_chance=layers[0].by_chance,
    )


def _gaps(top_k_index: np.ndarray, n_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Return each use's token position, and the tokens since the expert's last use in the sequence
    (position + 1 without one)."""
    n_sequences, seq_len, top_k = top_k_index.shape
    first_cell = np.arange(n_sequences)[:, None, None] * n_experts
    cell = (top_k_index.astype(np.int64) + first_cell).reshape(-1)  # one per sequence and expert
    position = np.tile(np.repeat(np.arange(seq_len), top_k), n_sequences)
    order = np.argsort(cell, kind="stable")  # uses of one cell adjacent, in the text's order
    cell, position = cell[order], position[order]
    gap = position + 1
    again = np.flatnonzero(cell[1:] == cell[:-1]) + 1
    gap[again] = position[again] - position[again - 1]
    return position, gap
