"""Caching and reading ahead by a profile's traces: results, by layer and for the model.

A use is a (token, expert) choice. A share is of uses, 0..1, and None where there were no tokens to
measure it on. Figures of the whole model are means over its MoE layers, unless they say otherwise.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from moe_tool.artifacts.json_fields import Spread

Shares = tuple[float | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainPair:
    """A hot set of one domain, asked of another one."""

    hot_in: str
    """Whose in-sample loads chose the set"""
    asked_of: str
    """Whose held-out uses it has to answer"""
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainTransfer:
    """How well each domain's hot set answers every domain's held-out uses."""

    shares: tuple[Shares, ...]
    """[D, D]: the set that is hot in the row's domain, on the uses of the column's"""
    same_domain: float | None
    """Mean of the diagonal"""
    other_domain: float | None
    """Mean beside the diagonal"""
    worst: DomainPair | None
    """The lowest beside the diagonal"""


@dataclass(frozen=True, slots=True, kw_only=True)
class HotSetCoverage:
    """Uses that the hottest experts in-sample answer."""

    percent: int
    """Size of the set, of a layer's experts"""
    n_hot: int
    """The same in experts, rounded down, at least one"""
    by_chance: float
    """Share that a set of this size answers where all experts are used evenly"""
    in_sample: float | None
    held_out: float | None
    """Share that the same set answers held-out"""
    best_per_sequence: float | None
    """Mean over held-out sequences of what each one's own best set of this size answers: nothing
    that is chosen once for a whole prompt does better"""
    domains: DomainTransfer | None
    """None with fewer than two domains"""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatePrediction:
    """How well the experts named beforehand are those chosen, on one part of the tokens."""

    n_tokens: int
    share: float
    """Share of the uses whose expert was among the K named"""
    by_chance: float
    """Share expected if names and choices were independent draws with the loads they have"""
    top_1: float
    """Share of the tokens whose expert with the largest gate weight was among the K named"""
    top_1_by_chance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NextGate:
    """A layer's router applied to the input of the MoE layer that is `depth` before it."""

    depth: int
    from_layer: int | None
    """Decoder-layer index of that earlier layer; None in a mean over layers"""
    in_sample: GatePrediction | None
    held_out: GatePrediction | None


@dataclass(frozen=True, slots=True, kw_only=True)
class UnionGrowth:
    """Distinct experts that n consecutive tokens of a sequence touch in a layer, over K."""

    n_tokens: tuple[int, ...]
    """n"""
    measured: Shares
    """By n, mean over all windows of all sequences; not a share: 1..n. None where no sequence has n
    tokens"""
    by_chance: tuple[float, ...]
    """By n, if every token drew its K experts uniformly and on its own"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReuseBin:
    """Uses whose reuse distance lies from `low` to `high`."""

    low: int
    high: int
    uses: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReuseHistogram:
    """Distinct other experts between two uses of the same one, in the order of decoding.

    An expert cache of c slots that drops the least recently used one answers the uses at a distance
    below c.
    """

    uses: int
    """Number of uses"""
    first_uses: int
    bins: tuple[ReuseBin, ...]
    """0, 1, 2-3, 4-7, ... up to what the number of experts allows"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRouting:
    """One MoE layer."""

    layer: int
    """Decoder-layer index"""
    hot_sets: tuple[HotSetCoverage, ...]
    """By size"""
    next_gate: tuple[NextGate, ...]
    """By depth: how this layer's choices were foreseen; empty in the first MoE layer"""
    union_growth: UnionGrowth
    reuse: ReuseHistogram
    """Reuse of held-out uses, other experts of this layer counted alone"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingReport:
    """One profile."""

    domains: tuple[str, ...]
    hot_sets: tuple[HotSetCoverage, ...]
    next_gate: tuple[NextGate, ...]
    union_growth: UnionGrowth
    reuse: ReuseHistogram
    """Reuse of held-out uses in their order through all layers, experts of all layers counted"""
    reuse_within_layer: ReuseHistogram
    """Sum over the layers'"""
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
    """Chance that an expert used by a token was used by the previous token, in-sample"""
    locality_by_chance: float
    """Chance of it if every token drew its experts by the loads alone"""
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
    pin: str
    """Whether the hot set is worth a place in memory: pin, do not pin, nothing to pin, unknown"""

    @property
    def coverage_by_chance(self) -> float:
        """Share that a set of this size would answer if all experts were used evenly."""
        return self.n_hot / self.n_experts


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileRouting(Spread):
    """Routing of a profile, by layer and for the model."""

    coverage: tuple[LayerCoverage, ...]
    routing: RoutingReport


def mean_of_known(values: Iterable[float | None]) -> float | None:
    """Return the mean of what is not None, None where all are."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
