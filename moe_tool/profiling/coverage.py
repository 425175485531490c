"""How unevenly a layer uses its experts, and whether that holds for text it was not measured on."""

from dataclasses import dataclass

import numpy as np

from moe_tool.artifacts.expert_statistics import ExpertStatistics, RoutingCounts

HOT_SHARE = 0.25
"""The hot set is the hottest quarter of the experts."""
MIN_GAIN = 0.05
"""A hot set that answers less than this above what even use would give is not worth a pin."""
MIN_KEPT = 0.8
"""A hot set holds up where this share of its gain over even use is there on held-out tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCoverage:
    """One MoE layer's row of a profile's table. A use is a (token, expert) choice."""

    layer: int
    n_experts: int
    n_hot: int
    """Experts in the hot set: the hottest quarter in-sample, at least one; ties by lower index"""
    n_tokens: int
    n_tokens_held_out: int
    load_skew: float
    """Load of the hottest expert over the mean load, in-sample; 1 is even, 0 without tokens"""
    entropy: float
    """Entropy of the in-sample loads over log E, 0..1; 1 is even"""
    never_used: int
    """Experts that no in-sample token chose"""
    locality: float
    """Chance that an expert used by a token was used by the previous token, in-sample"""
    locality_by_chance: float
    """What it would be if every token drew its experts by the loads alone"""
    coverage: float
    """Share of the in-sample uses that the hot set answers"""
    coverage_held_out: float | None
    """Share of the held-out uses that the same set answers; None without held-out tokens"""
    coverage_held_out_best: float | None
    """Share that the held-out tokens' own hottest quarter answers: the most that a set can"""
    domain_coverage: tuple[float | None, ...]
    """[D]: share of each domain's in-sample uses that the hot set answers; None without tokens"""
    domain_coverage_held_out: tuple[float | None, ...]
    """[D]: the same of its held-out uses"""
    domain_distance: float
    """Largest total variation between two domains' in-sample loads: 0 alike, 1 no shared expert"""

    @property
    def coverage_by_chance(self) -> float:
        """Share that a set of this size would answer if all experts were used evenly."""
        return self.n_hot / self.n_experts


def layer_coverage(layer: int, statistics: ExpertStatistics) -> LayerCoverage:
    """Return the row of one layer.

    Args:
        layer: decoder-layer index.
        statistics: of that layer; either part may be without tokens.
    """
    inside, outside = statistics.in_sample, statistics.held_out
    n_experts = len(inside.load)
    hot = hottest(inside.load, n_hot=max(1, int(n_experts * HOT_SHARE)))
    own = hottest(outside.load, n_hot=len(hot))
    coverage = _share(inside.load, hot)
    return LayerCoverage(
        layer=layer,
        n_experts=n_experts,
        n_hot=len(hot),
        n_tokens=inside.n_tokens,
        n_tokens_held_out=outside.n_tokens,
        load_skew=_load_skew(inside.load),
        entropy=_entropy(inside.load),
        never_used=int((inside.load == 0).sum()),
        locality=inside.same_as_previous,
        locality_by_chance=_locality_by_chance(inside),
        coverage=0.0 if coverage is None else coverage,
        coverage_held_out=_share(outside.load, hot),
        coverage_held_out_best=_share(outside.load, own),
        domain_coverage=tuple(_share(load, hot) for load in inside.domain_load),
        domain_coverage_held_out=tuple(_share(load, hot) for load in outside.domain_load),
        domain_distance=_largest_total_variation(inside.domain_load),
    )


def hottest(load: np.ndarray, *, n_hot: int) -> np.ndarray:
    """Return the ids of the most used experts, hottest first, ties by lower id.

    Args:
        load: [E] int64.
        n_hot: how many, at most E.
    """
    return np.argsort(-load, kind="stable")[:n_hot]


def pin_verdict(coverage: LayerCoverage) -> str:
    """Return in one line whether the in-sample hot set is worth pinning, with its figures."""
    even = coverage.coverage_by_chance
    held_out = coverage.coverage_held_out
    if held_out is None:
        return f"unknown: {coverage.coverage:.1%} in-sample, nothing held out"
    gain, kept = coverage.coverage - even, held_out - even
    if gain < MIN_GAIN:
        verdict = "nothing to pin"
    elif kept >= MIN_KEPT * gain:
        verdict = "pin"
    else:
        verdict = "do not pin"
    return (
        f"{verdict}: hottest {coverage.n_hot} of {coverage.n_experts} answer {held_out:.1%} "
        f"held-out, {coverage.coverage:.1%} in-sample, {even:.1%} if even"
    )


def _load_skew(load: np.ndarray) -> float:
    return float(load.max() / load.mean()) if load.any() else 0.0


def _entropy(load: np.ndarray) -> float:
    """Return the entropy of [E] loads over log E; 0 where one expert has it all."""
    used = load[load > 0]
    if used.size <= 1:
        return 0.0
    share = used / used.sum()
    return float(np.clip(-(share * np.log(share)).sum() / np.log(len(load)), 0.0, 1.0))


def _locality_by_chance(counts: RoutingCounts) -> float:
    """A use is of e with chance load_e / sum; another token uses e with chance load_e / T."""
    uses = counts.load.sum()
    if uses == 0:
        return 0.0
    load = counts.load.astype(np.float64)
    return float((load * load).sum() / uses / counts.n_tokens)


def _share(load: np.ndarray, chosen: np.ndarray) -> float | None:
    """Return the share of [E] loads that falls on the chosen experts, None without loads."""
    total = load.sum()
    return float(load[chosen].sum() / total) if total else None


def _largest_total_variation(domain_load: np.ndarray) -> float:
    """Return max over pairs of domains of half the sum of |p_e - q_e|, from [D, E] loads."""
    loads = domain_load[domain_load.sum(axis=1) > 0].astype(np.float64)
    if len(loads) < 2:
        return 0.0
    shares = loads / loads.sum(axis=1, keepdims=True)
    return float(np.abs(shares[:, None] - shares[None]).sum(axis=2).max() / 2)
