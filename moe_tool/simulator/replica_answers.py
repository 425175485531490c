"""Answers of `replica` to the accesses of a profile's decode trace, for a replay of two caches."""

import numpy as np

from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.policies.misses.replica import threshold, unimportance
from moe_tool.simulator.profile_trace import Part, rows_of_part
from moe_tool.simulator.two_caches import CHEAPER, NOTHING, WHOLE


def replica_limits(
    profile: ProfileReader, high: float, low: float
) -> dict[int, tuple[float, float]]:
    """Return T1 and T2 by decoder layer, at which the in-sample slots have the shares `high` and
    `low`."""
    rows = rows_of_part(profile, "in-sample")
    found = {}
    for layer in profile.header.shape.layers:
        s = unimportance(profile.gate_weights(layer)[rows].astype(np.float32))
        table = np.quantile(s, np.linspace(0, 1, 101), method="inverted_cdf")
        found[layer] = threshold(table, high), threshold(table, min(1.0, high + low))
    return found


def replica_answers(
    profile: ProfileReader,
    part: Part,
    limits: dict[int, tuple[float, float]],
    *,
    max_tokens: int | None = None,
) -> np.ndarray:
    """Return WHOLE, CHEAPER or NOTHING for every access of `decode_trace`, [A] uint8.

    Args:
        limits: T1 and T2 by decoder layer.
        max_tokens: as in `decode_trace`.

    Raises:
        ValueError: a token chose an expert twice.
    """
    rows = rows_of_part(profile, part, max_tokens)
    layers = profile.header.shape.layers
    answers = np.empty((len(rows), len(layers), profile.header.shape.top_k), np.uint8)
    for at, layer in enumerate(layers):
        chosen = profile.indices(layer, "top_k_index")[rows]
        order = np.argsort(chosen, axis=1)
        ids = np.take_along_axis(chosen, order, axis=1)
        if (ids[:, 1:] == ids[:, :-1]).any():
            raise ValueError("a token chose an expert twice")
        s = unimportance(profile.gate_weights(layer)[rows].astype(np.float32))
        t1, t2 = limits[layer]
        answer = np.where(s <= t1, WHOLE, np.where(s <= t2, CHEAPER, NOTHING))
        answers[:, at] = np.take_along_axis(answer, order, axis=1)
    return answers.reshape(-1)
