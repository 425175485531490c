"""Caching and prefetching figures of a profile, by layer and for the model.

A use is a (token, expert) choice. A share is a fraction of the uses, 0..1; None without tokens.
Model figures are means over its MoE layers, unless they say otherwise.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from moe_tool.artifacts.json_fields import Spread

Shares = tuple[float | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainPair:
    """Share of one domain's held-out uses that another domain's hot set covers."""

    hot_in: str
    """Domain whose in-sample loads chose the set"""
    asked_of: str
    """Domain whose held-out uses are counted"""
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainTransfer:
    """Coverage of every domain's held-out uses by every domain's hot set."""

    shares: tuple[Shares, ...]
    """[D, D] shares: the hot set of the row's domain on the uses of the column's"""
    same_domain: float | None
    """Mean of the diagonal"""
    other_domain: float | None
    """Mean of the entries off the diagonal"""
    worst: DomainPair | None
    """Lowest entry off the diagonal"""


@dataclass(frozen=True, slots=True, kw_only=True)
class HotSetCoverage:
    """Share of the uses covered by the most used experts, chosen in-sample."""

    percent: int
    """Size of the set in percent of a layer's experts"""
    n_hot: int
    """Size of the set in experts, rounded down, at least one"""
    by_chance: float
    """Share that a set of this size covers if all experts are used evenly"""
    in_sample: float | None
    held_out: float | None
    """Share of the held-out uses that the in-sample set covers"""
    best_per_sequence: float | None
    """Mean over held-out sequences of the share covered by each one's best set of this size: an
    upper bound for any set chosen once per prompt"""
    domains: DomainTransfer | None
    """Transfer between domains; None with fewer than two"""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatePrediction:
    """Accuracy of predicted experts, in-sample or held-out."""

    n_tokens: int
    share: float
    """Share of the uses whose expert was among the K predicted"""
    by_chance: float
    """Expected share if predictions and choices were independent with the same loads"""
    top_1: float
    """Share of the tokens whose expert of largest gate weight was among the K predicted"""
    top_1_by_chance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NextGate:
    """A layer's router applied early, to the input of the MoE layer `depth` before it."""

    depth: int
    from_layer: int | None
    """Decoder-layer index of the earlier layer; None in a mean over layers"""
    in_sample: GatePrediction | None
    held_out: GatePrediction | None


@dataclass(frozen=True, slots=True, kw_only=True)
class UnionGrowth:
    """Distinct experts that n consecutive tokens of a sequence use in a layer, over K."""

    n_tokens: tuple[int, ...]
    """Window lengths n"""
    measured: Shares
    """Mean over all windows by n: 1..n, not a share; None where no sequence has n tokens"""
    by_chance: tuple[float, ...]
    """Expected value by n if every token drew its K experts uniformly"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReuseBin:
    """Uses whose reuse distance lies from `low` to `high`."""

    low: int
    high: int
    uses: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReuseHistogram:
    """Distinct other experts between two uses of the same one, in decoding order.

    An LRU cache of c slots hits the uses at a distance below c.
    """

    uses: int
    """Number of uses in all bins, first uses included"""
    first_uses: int
    bins: tuple[ReuseBin, ...]
    """Distances 0, 1, 2-3, 4-7, ... up to the number of experts"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRouting:
    """Routing figures of one MoE layer."""

    layer: int
    """Decoder-layer index"""
    hot_sets: tuple[HotSetCoverage, ...]
    """Coverage by size of the set"""
    next_gate: tuple[NextGate, ...]
    """Predictions of this layer's choices by depth; empty in the first MoE layer"""
    union_growth: UnionGrowth
    reuse: ReuseHistogram
    """Distances between held-out uses, counting other experts of this layer only"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingReport:
    """Routing figures of one profile."""

    domains: tuple[str, ...]
    hot_sets: tuple[HotSetCoverage, ...]
    next_gate: tuple[NextGate, ...]
    union_growth: UnionGrowth
    reuse: ReuseHistogram
    """Distances between held-out uses in decoding order, counting experts of all layers"""
    reuse_within_layer: ReuseHistogram
    """Sum of the layers' histograms"""
    layers: tuple[LayerRouting, ...]


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
    """Probability that an expert used by a token was used by the previous token, in-sample"""
    locality_by_chance: float
    """Locality if every token drew its experts by the loads alone"""
    coverage: float
    """Share of the in-sample uses that the hot set covers"""
    coverage_held_out: float | None
    """Share of the held-out uses that the same set covers; None without held-out tokens"""
    coverage_held_out_best: float | None
    """Share that the held-out tokens' own hottest quarter covers: the upper bound"""
    domain_coverage: tuple[float | None, ...]
    """[D] shares of the in-sample uses that the hot set covers, by domain; None without tokens"""
    domain_coverage_held_out: tuple[float | None, ...]
    """[D] shares of the held-out uses that the hot set covers, by domain"""
    domain_distance: float
    """Largest total variation between two domains' in-sample loads: 0 equal, 1 no shared expert"""
    pin: str
    """Advice on pinning the hot set: pin, do not pin, nothing to pin, unknown"""

    @property
    def coverage_by_chance(self) -> float:
        """Share that a set of this size would cover if all experts were used evenly."""
        return self.n_hot / self.n_experts


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileRouting(Spread):
    """Routing of a profile, by layer and for the model."""

    coverage: tuple[LayerCoverage, ...]
    routing: RoutingReport


def mean_of_known(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None; None if all are."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
