"""BuddyMoE's gates: conditions under which a miss may be answered by something else."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from moe_tool.artifacts.routing import PRIMARY, Routing
from moe_tool.policies.parameters import Parameter, whole_number

GATE_PARAMETERS: Mapping[str, Parameter] = {
    "rho": whole_number(
        "slots of a token in a layer that may be answered otherwise; -1: half of K, rounded up",
        default=-1,
        least=-1,
        most=1024,
    ),
    "beta": Parameter(
        help="share of a sequence's slots that, if missing, makes it be answered exactly",
        default=0.6,
        most=2,
    ),
    "gamma": Parameter(
        help="distance of a token's two heaviest gate weights, as shares of all, above which it "
        "is answered exactly; 1: never",
        default=1,
    ),
}
"""Parameters of every gated policy"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gates:
    """BuddyMoE's gates (arXiv:2511.10054): entropy tau, distribution beta, at most rho per token.

    Deviation: the share of missing (token, expert) slots is that of a sequence, not of the
    micro-batch, so that answers do not depend on other sequences in the batch.
    """

    entropy_threshold: Mapping[int, float]
    """tau by decoder layer, 0 to 1: a token is answered exactly unless its entropy is above it"""
    bypass_share: float = 0.6
    """beta: a sequence is answered exactly if this share of its slots or more is missing"""
    max_substitutions: int | None = None
    """rho: slots per token that may be answered otherwise; None: ceil(K / 2)"""
    max_margin: float = 1.0
    """gamma: a token is answered exactly if its two heaviest gate weights, as shares of all, differ
    by more; 1: never"""
    enabled: bool = True
    """False: every miss of a decode step may be answered otherwise"""

    def tuned(self, values: Mapping[str, float]) -> "Gates":
        """Return the gates with the values of GATE_PARAMETERS that differ from their defaults."""
        found = replace(self, max_margin=values["gamma"])
        if values["beta"] != GATE_PARAMETERS["beta"].default:
            found = replace(found, bypass_share=values["beta"])
        if values["rho"] >= 0:
            found = replace(found, max_substitutions=int(values["rho"]))
        return found

    def describe(self) -> str:
        if not self.enabled:
            return "gates off"
        limit = "half of top-k" if self.max_substitutions is None else f"{self.max_substitutions}"
        return f"gates: entropy, missing share below {self.bypass_share:g}, at most {limit} a token"


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenSlots:
    """Slots of one layer call that pass the gates."""

    open: np.ndarray
    """[T, K] bool: missing slots that may be answered by something else"""
    order: np.ndarray
    """[T, K] int64: each token's slots in descending gate weight, ties by position"""
    limit: int
    """Slots per token that may be answered otherwise"""


def open_slots(gates: Gates, routing: Routing, resident: np.ndarray) -> OpenSlots | None:
    """Return the slots that need not be fetched, given the residents [F, E] bool; None if there are
    none."""
    if resident[PRIMARY].all():
        return None
    top_k = routing.index.shape[1]
    missing = routing.present & ~resident[PRIMARY][routing.index]  # [T, K]
    limit = top_k
    if gates.enabled:
        rho = gates.max_substitutions
        limit = (top_k + 1) // 2 if rho is None else min(rho, top_k)
        entropy = token_activating_entropy(routing.weight)  # [T]
        willing = entropy > gates.entropy_threshold[routing.layer]
        willing &= _margin(routing.weight) <= gates.max_margin
        willing &= _missing_share(missing, routing) < gates.bypass_share
        missing = missing & willing[:, None]
    if limit <= 0 or not missing.any():
        return None
    order = np.argsort(-routing.weight, axis=1, kind="stable")
    return OpenSlots(open=missing, order=order, limit=limit)


def token_activating_entropy(weights: np.ndarray) -> np.ndarray:
    """Return the entropy of each token's gate weights over log K, [T] float64 in 0..1.

    0 is one expert with all the weight, 1 is equal weight for all K. It is 0 for K = 1 and for zero
    weights.

    Source: arXiv:2511.10054, TAE; without its optional temperature.

    Args:
        weights: [T, K] float, >= 0, the gate weights of the chosen experts; need not sum to 1.
    """
    n_tokens, top_k = weights.shape
    if top_k == 1:
        return np.zeros(n_tokens)
    gates = np.maximum(weights.astype(np.float64), 0.0)
    total = gates.sum(axis=1, keepdims=True)
    share = np.divide(gates, total, out=np.zeros_like(gates), where=total > 0)
    log_share = np.log(share, out=np.zeros_like(share), where=share > 0)
    entropy = -(share * log_share).sum(axis=1) / np.log(top_k)
    clipped: np.ndarray = np.clip(entropy, 0.0, 1.0)  # rounding can exceed 1
    return clipped


def _margin(weight: np.ndarray) -> np.ndarray:
    """Return the distance of each token's two heaviest gate weights, as shares of all, [T]."""
    if weight.shape[1] < 2:
        return np.ones(len(weight))
    ranked = -np.sort(-weight.astype(np.float64), axis=1)
    total = ranked.sum(axis=1)
    margin: np.ndarray = np.divide(
        ranked[:, 0] - ranked[:, 1], total, out=np.zeros(len(total)), where=total > 0
    )
    return margin


def _missing_share(missing: np.ndarray, routing: Routing) -> np.ndarray:
    """Return for each token the share of its sequence's present slots that are missing, [T]."""
    _, member = np.unique(routing.sequence, return_inverse=True)
    n_missing = np.bincount(member, weights=missing.sum(axis=1))
    n_slots = np.bincount(member, weights=routing.present.sum(axis=1))
    share: np.ndarray = n_missing / np.maximum(n_slots, 1)  # by sequence
    return share[member]
