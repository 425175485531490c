"""Check that the hottest experts of a profile are hot on held-out text too, before pinning them."""

from collections.abc import Callable

import numpy as np

from moe_tool.artifacts.expert_statistics import ExpertStatistics
from moe_tool.policies.hot_set import hottest_first
from moe_tool.policies.pin_rule import judge_pins


def rank_experts(statistics: dict[int, ExpertStatistics]) -> list[tuple[int, int]]:
    """Return (layer, expert), the most used in-sample first, as a bundle's heat ranks them."""
    loads = {}
    for layer, each in statistics.items():
        counts = each.in_sample
        share = np.minimum(counts.load / max(counts.n_tokens, 1), 1.0)
        loads[layer] = share.tolist()
    return hottest_first(loads)


def refuse_pins(
    statistics: dict[int, ExpertStatistics], ranked: list[tuple[int, int]], n_pinned: int
) -> str | None:
    """Return the reason against pinning the first `n_pinned` experts, at least 1, of
    `rank_experts`; None if there is none."""
    hot: dict[int, list[int]] = {layer: [] for layer in statistics}
    for layer, expert in ranked[:n_pinned]:
        hot[layer].append(expert)

    def coverage(loads: Callable[[ExpertStatistics], np.ndarray]) -> list[float | None]:
        """Return the shares of [D, E] uses that the experts answer, [D]; None without uses."""
        found = {layer: loads(each) for layer, each in statistics.items()}
        answered = sum(load[:, hot[layer]].sum(axis=1) for layer, load in found.items())
        uses = sum(load.sum(axis=1) for load in found.values())
        parts = zip(np.atleast_1d(answered), np.atleast_1d(uses), strict=True)
        return [float(part / whole) if whole else None for part, whole in parts]

    ruling = judge_pins(
        even=n_pinned / len(ranked),
        in_sample=coverage(lambda each: each.in_sample.load[None])[0] or 0.0,
        held_out=coverage(lambda each: each.held_out.load[None])[0],
        by_domain=coverage(lambda each: each.held_out.domain_load),
    )
    return None if ruling.verdict == "pin" else f"the {n_pinned} hottest experts {ruling.reason}"
