"""Measured statistics of one MoE layer's experts: loads, outputs, and errors of substitutes.

The error of an answer in place of expert i is relative, over the tokens routed to i:
eps = sqrt(E||E_i(x) - answer(x)||^2 / E||E_i(x)||^2). 0 is exact, 1 as bad as dropping the expert.
"""

from dataclasses import dataclass

import numpy as np

PRICED_WIDTHS: tuple[int, ...] = (8, 4, 3, 2, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingCounts:
    """Sums over the in-sample or the held-out tokens of a layer's trace."""

    n_tokens: int
    load: np.ndarray
    """[E] int64: tokens routed to each expert"""
    gate_sum: np.ndarray
    """[E] float64: sum of gate weights over those tokens"""
    coactivation: np.ndarray
    """[E, E] int64: tokens whose top-k contains both experts; the diagonal is the load"""
    domain_load: np.ndarray
    """[D, E] int64: load by domain"""
    same_as_previous: float
    """Probability that an expert used by a token was used by the previous one in its sequence"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeStatistics:
    """All experts of a layer evaluated on one sample of in-sample or held-out tokens."""

    n_sampled: int
    """Tokens in the shared sample"""
    n_cka: int
    """Tokens behind `cka`, spread over the shared sample: 256, or fewer if memory is short;
    summed over recordings that were merged"""
    n_routed: np.ndarray
    """[E] int64: sampled tokens routed to each expert, behind scale, eps_buddy and output_norm"""
    fell_back: np.ndarray
    """[E] bool: too few routed tokens, so all sampled tokens were used instead"""
    output_norm: np.ndarray
    """[E] float32: root mean square of ||E_i(x)||"""
    output_ratio: np.ndarray
    """[E] float32: root mean square of ||E_i(x)|| over that of the MoE layer's output on the same
    tokens"""
    cosine: np.ndarray
    """[E, E] float32: mean cosine of two experts' outputs on the same inputs"""
    cka: np.ndarray
    """[E, E] float32: linear CKA of centred outputs (Kornblith et al., arXiv:1905.00414)"""
    scale: np.ndarray
    """[E, E] float32: a[i, j] minimising ||E_i(x) - a E_j(x)|| over tokens routed to i"""
    eps_buddy: np.ndarray
    """[E, E] float32: relative error of a[i, j] E_j in place of E_i"""
    eps_drop: np.ndarray
    """[E] float32: relative error of dropping E_i: 1, or 0 for an expert whose output is zero"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertStatistics:
    """Measurements of one MoE layer."""

    in_sample: RoutingCounts
    held_out: RoutingCounts
    probe: ProbeStatistics
    """Probe of in-sample tokens"""
    probe_held_out: ProbeStatistics
    """Probe of held-out tokens, with scales fitted to them: its errors are optimistic"""
    eps_buddy_transferred: np.ndarray
    """[E, E] float32: relative error on held-out tokens with the scales fitted in-sample"""
    eps_bits: np.ndarray
    """[E, 5] float32: relative error of round-to-nearest codes at PRICED_WIDTHS bits, group 64"""
    eps_bits_n_tokens: np.ndarray
    """[E] int64: tokens behind eps_bits (at most 256 of each recording)"""
    router_similarity: np.ndarray
    """[E, E] float32: correlation of router logit columns over all in-sample tokens"""
    sensitivity: float
    """KL of the model's output in nats per unit of squared relative error of the layer's output"""
    sensitivity_n_tokens: int

    @property
    def nats(self) -> np.ndarray:
        """[E] float64: KL in nats added by dropping the expert at gate weight 1; an answer with
        error eps at gate weight g adds (g * eps)^2 times as much."""
        ratio = self.probe.output_ratio.astype(np.float64)
        found: np.ndarray = self.sensitivity * ratio**2
        return found
