"""Statistics of one layer over two recordings, from the statistics of each.

Counts and sums add up. Means are weighted by the tokens behind them. Scales and errors of buddies
follow from sums of inner products, which are recovered from the stored figures and added; an
expert with too few routed tokens in one recording only is taken from the other. Prices of bits are
pooled as squared errors weighted by the expert's output energy. CKA is no sum over tokens: the mean
of both values, weighted by tokens, stands for it.
"""

from dataclasses import dataclass

import numpy as np

from moe_tool.artifacts.expert_statistics import ExpertStatistics, ProbeStatistics, RoutingCounts
from moe_tool.profiling.expert_probe import MIN_ROUTED_TOKENS


@dataclass(frozen=True, slots=True)
class _Sums:
    """Sums over the tokens behind each expert i of a probe, float64."""

    own: np.ndarray
    """[E]: ||E_i||^2"""
    inner: np.ndarray
    """[E, E]: <E_i, E_j>"""
    energy: np.ndarray
    """[E, E]: ||E_j||^2"""
    layer: np.ndarray
    """[E]: ||y||^2 of the layer's output"""
    behind: np.ndarray
    """[E]: tokens"""

    def weighted(self, weight: np.ndarray) -> "_Sums":
        """Return the sums times a weight by expert, [E]."""
        return _Sums(
            self.own * weight,
            self.inner * weight[:, None],
            self.energy * weight[:, None],
            self.layer * weight,
            self.behind * weight,
        )

    def plus(self, other: "_Sums") -> "_Sums":
        """Return the sums over both recordings."""
        return _Sums(
            self.own + other.own,
            self.inner + other.inner,
            self.energy + other.energy,
            self.layer + other.layer,
            self.behind + other.behind,
        )

    def price(self, scale: np.ndarray, *, is_empty: bool) -> np.ndarray:
        """Return the relative errors of scaled buddies, [E, E] float32, as ExpertProbe does."""
        own = np.broadcast_to(self.own[:, None], self.inner.shape)
        a = scale.astype(np.float64)
        error = np.maximum(own - 2 * a * self.inner + a * a * self.energy, 0.0)
        worthless = np.where((error > 0) | is_empty, 1.0, 0.0)
        found: np.ndarray = np.sqrt(np.divide(error, own, out=worthless, where=own > 0))
        return found.astype(np.float32)


def merge_statistics(
    old: ExpertStatistics,
    new: ExpertStatistics,
    *,
    domains: tuple[np.ndarray, np.ndarray],
    n_domains: int,
    router_similarity: np.ndarray,
) -> ExpertStatistics:
    """Return the statistics over both recordings.

    Args:
        domains: for each recording, index of its domains among the merged ones.
        router_similarity: [E, E] over the in-sample tokens of both, which no rule can merge.
    """
    probe, _ = _merge_probe(old.probe, new.probe)
    held_out, sums = _merge_probe(old.probe_held_out, new.probe_held_out)
    energies = [
        part.eps_bits_n_tokens * part.probe.output_norm.astype(np.float64) ** 2
        for part in (old, new)
    ]
    watched = old.sensitivity_n_tokens + new.sensitivity_n_tokens
    return ExpertStatistics(
        in_sample=_merge_counts(old.in_sample, new.in_sample, domains, n_domains),
        held_out=_merge_counts(old.held_out, new.held_out, domains, n_domains),
        probe=probe,
        probe_held_out=held_out,
        eps_buddy_transferred=sums.price(probe.scale, is_empty=held_out.n_sampled == 0),
        eps_bits=np.sqrt(
            _mean(
                old.eps_bits.astype(np.float64) ** 2,
                new.eps_bits.astype(np.float64) ** 2,
                energies[0][:, None],
                energies[1][:, None],
            )
        ).astype(np.float32),
        eps_bits_n_tokens=old.eps_bits_n_tokens + new.eps_bits_n_tokens,
        router_similarity=router_similarity,
        sensitivity=(
            old.sensitivity * old.sensitivity_n_tokens + new.sensitivity * new.sensitivity_n_tokens
        )
        / max(watched, 1),
        sensitivity_n_tokens=watched,
    )


def _merge_counts(
    old: RoutingCounts, new: RoutingCounts, domains: tuple[np.ndarray, np.ndarray], n_domains: int
) -> RoutingCounts:
    by_domain = np.zeros((n_domains, len(old.load)), np.int64)
    for part, index in zip((old, new), domains, strict=True):
        np.add.at(by_domain, index, part.domain_load)
    n_tokens = old.n_tokens + new.n_tokens
    # All sequences have one length, so that pairs of neighbours are in proportion to tokens.
    repeats = old.same_as_previous * old.n_tokens + new.same_as_previous * new.n_tokens
    return RoutingCounts(
        n_tokens=n_tokens,
        load=old.load + new.load,
        gate_sum=old.gate_sum + new.gate_sum,
        coactivation=old.coactivation + new.coactivation,
        domain_load=by_domain,
        same_as_previous=repeats / max(n_tokens, 1),
    )


def _merge_probe(old: ProbeStatistics, new: ProbeStatistics) -> tuple[ProbeStatistics, _Sums]:
    """Return the merged probe and the sums that it follows from."""
    counts = old.n_sampled + new.n_sampled
    fell_back = _falls_back(old) & _falls_back(new)
    sums = (
        _sums(old, new)
        .weighted(~_falls_back(old) | fell_back)
        .plus(_sums(new, old).weighted(~_falls_back(new) | fell_back))
    )
    zeros = np.zeros_like(sums.inner)
    scale = np.divide(sums.inner, sums.energy, out=zeros, where=sums.energy > 0).astype(np.float32)
    price = sums.price(scale, is_empty=counts == 0)
    np.fill_diagonal(price, 0.0 if counts else 1.0)
    ratio = np.divide(sums.own, sums.layer, out=np.zeros_like(sums.own), where=sums.layer > 0)
    drop = np.where(sums.own > 0, 1.0, 0.0) if counts else np.ones(len(sums.own))
    merged = ProbeStatistics(
        n_sampled=counts,
        n_cka=old.n_cka + new.n_cka,
        n_routed=old.n_routed + new.n_routed,
        fell_back=fell_back,
        output_norm=np.sqrt(sums.own / np.maximum(sums.behind, 1)).astype(np.float32),
        output_ratio=np.sqrt(ratio).astype(np.float32),
        cosine=_mean(old.cosine, new.cosine, old.n_sampled, new.n_sampled).astype(np.float32),
        cka=_mean(old.cka, new.cka, old.n_cka, new.n_cka).astype(np.float32),
        scale=scale,
        eps_buddy=price,
        eps_drop=drop.astype(np.float32),
    )
    return merged, sums


def _falls_back(probe: ProbeStatistics) -> np.ndarray:
    return probe.fell_back.astype(bool) | (probe.n_routed < MIN_ROUTED_TOKENS)


def _sums(probe: ProbeStatistics, other: ProbeStatistics) -> _Sums:
    """Recover the sums from the best scales, a = <i, j> / ||j||^2; eps^2 = 1 - a <i, j> / ||i||^2.

    A scale near 0 tells nothing of ||j||^2: the other recording's mean stands in, or else j's own.
    """
    behind = _behind(probe)
    norm = probe.output_norm.astype(np.float64)
    own = behind * norm**2
    mine, theirs = _mean_energy(probe), _mean_energy(other)
    usual = np.broadcast_to(norm[None, :] ** 2, mine.shape)
    mean = np.where(np.isnan(mine), np.where(np.isnan(theirs), usual, theirs), mine)
    energy = behind[:, None] * mean
    ratio = probe.output_ratio.astype(np.float64) ** 2
    layer = np.divide(own, ratio, out=np.zeros_like(own), where=ratio > 0)
    return _Sums(own, probe.scale.astype(np.float64) * energy, energy, layer, behind)


def _behind(probe: ProbeStatistics) -> np.ndarray:
    return np.where(probe.fell_back, probe.n_sampled, probe.n_routed).astype(np.float64)


def _mean_energy(probe: ProbeStatistics) -> np.ndarray:
    """Return ||E_j||^2 per token behind i, [E, E] float64, NaN where rounding hides it."""
    a = probe.scale.astype(np.float64)
    explained = np.clip(1 - probe.eps_buddy.astype(np.float64) ** 2, 0.0, 1.0)
    own = np.broadcast_to(probe.output_norm.astype(np.float64)[:, None] ** 2, a.shape)
    hidden = np.full(a.shape, np.nan)
    tells = (explained > 1e-5) & (a != 0) & (own > 0)
    found: np.ndarray = np.divide(explained * own, a * a, out=hidden, where=tells)
    return found


def _mean(
    old: np.ndarray, new: np.ndarray, n_old: np.ndarray | int, n_new: np.ndarray | int
) -> np.ndarray:
    """Return the weighted mean; the plain one where both weights are 0."""
    is_empty = np.asarray(n_old + n_new) == 0
    first = np.where(is_empty, 1.0, n_old)
    second = np.where(is_empty, 1.0, n_new)
    found: np.ndarray = (old * first + new * second) / (first + second)
    return found
