"""BuddyMoE's gates: conditions under which a miss may be answered by something else."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from moe_tool.artifacts.routing import PRIMARY, Routing
from moe_tool.errors import UsageError
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
    "beta-ms": Parameter(
        help="milliseconds that a sequence's missing slots may take to read in one layer; with "
        "more it is answered exactly; inf: no limit",
        default=math.inf,
        most=math.inf,
    ),
    "gb-per-s": Parameter(
        help="bandwidth of the PCIe link or disk that beta-ms assumes, in 10^9 bytes; 0: not given",
        default=0,
        most=10**4,
    ),
    "gamma": Parameter(
        help="distance of a token's two heaviest gate weights, as shares of all, above which it "
        "is answered exactly; 1: never",
        default=1,
    ),
    "tau": Parameter(
        help="entropy up to which a token is answered exactly; -1: a percentile of the profile's",
        default=-1,
        least=-1,
    ),
    "tau-percentile": Parameter(
        help="percentile of each layer's entropies in the profile to take as tau; -1: the one in "
        "the buddy map, 15",
        default=-1,
        least=-1,
        most=100,
    ),
    "temperature": Parameter(
        help="exponent 1/T on the gate weights before their entropy is taken; other than 1 it "
        "needs tau",
        default=1,
        least=0.01,
        most=100,
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
    bypass_bytes: float = math.inf
    """beta as a budget: a sequence is answered exactly if its missing slots are more bytes"""
    expert_bytes: float = 0.0
    """Mean size of an expert's record, for that budget"""
    entropy_quantiles: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    """Evenly spaced quantiles of the entropy in the profile, by decoder layer, from the least to
    the greatest; empty if unknown"""
    temperature: float = 1.0
    """Temperature of the gate weights whose entropy is taken"""
    max_substitutions: int | None = None
    """rho: slots per token that may be answered otherwise; None: ceil(K / 2)"""
    max_margin: float = 1.0
    """gamma: a token is answered exactly if its two heaviest gate weights, as shares of all, differ
    by more; 1: never"""
    enabled: bool = True
    """False: every miss of a decode step may be answered otherwise"""

    def tuned(self, values: Mapping[str, float]) -> "Gates":
        """Return the gates with the values of GATE_PARAMETERS that differ from their defaults.

        Raises:
            UsageError: the gates are enabled and two values contradict each other, or one needs
                another or entropies that the buddy map does not have.
        """
        if not self.enabled:
            return self
        found = replace(
            self,
            max_margin=values["gamma"],
            temperature=values["temperature"],
            entropy_threshold=self._thresholds(values),
            bypass_bytes=_byte_budget(values),
        )
        if values["beta"] != GATE_PARAMETERS["beta"].default:
            found = replace(found, bypass_share=values["beta"])
        if values["rho"] >= 0:
            found = replace(found, max_substitutions=int(values["rho"]))
        return found

    def _thresholds(self, values: Mapping[str, float]) -> Mapping[int, float]:
        """Return tau by decoder layer: the given one, a given percentile or the map's own."""
        tau, percentile = values["tau"], values["tau-percentile"]
        if tau >= 0:
            if percentile >= 0:
                raise UsageError("tau and tau-percentile are both given", hint="give one of them")
            return dict.fromkeys(self.entropy_threshold, tau)
        if values["temperature"] != 1:
            raise UsageError(
                "the profile's entropies are of temperature 1",
                hint="give tau beside another temperature, such as tau=0.95",
            )
        if percentile < 0:
            return self.entropy_threshold
        if not all(self.entropy_quantiles.get(layer) for layer in self.entropy_threshold):
            raise UsageError(
                "tau-percentile: the buddy map in this bundle holds no quantiles of the entropy",
                hint="make it again with moe-tool buddies and pack it, or give tau",
            )
        return {
            layer: float(np.interp(percentile / 100, np.linspace(0, 1, len(grid)), grid))
            for layer, grid in self.entropy_quantiles.items()
        }

    def describe(self) -> str:
        if not self.enabled:
            return "gates off"
        limit = "half of top-k" if self.max_substitutions is None else f"{self.max_substitutions}"
        share = f"missing share below {self.bypass_share:g}"
        if not math.isinf(self.bypass_bytes):
            share += f" and at most {self.bypass_bytes / 1e6:.3g} MB missing"
        return f"gates: entropy, {share}, at most {limit} a token"


def _byte_budget(values: Mapping[str, float]) -> float:
    """Return the bytes that can be read in `beta-ms`; infinity without a limit."""
    milliseconds, bandwidth = values["beta-ms"], values["gb-per-s"]
    if math.isinf(milliseconds):
        return math.inf
    if bandwidth == 0:
        raise UsageError(
            "beta-ms needs the bandwidth of the PCIe link or disk",
            hint="add gb-per-s, such as gb-per-s=16",
        )
    return milliseconds * bandwidth * 1e6


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
        entropy = token_activating_entropy(routing.weight, gates.temperature)  # [T]
        willing = entropy > gates.entropy_threshold[routing.layer]
        willing &= _margin(routing.weight) <= gates.max_margin
        n_missing, n_slots = _slots_of_sequence(missing, routing)
        willing &= n_missing / np.maximum(n_slots, 1) < gates.bypass_share
        willing &= n_missing * gates.expert_bytes <= gates.bypass_bytes
        missing = missing & willing[:, None]
    if limit <= 0 or not missing.any():
        return None
    order = np.argsort(-routing.weight, axis=1, kind="stable")
    return OpenSlots(open=missing, order=order, limit=limit)


def token_activating_entropy(weights: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Return the entropy of each token's gate weights over log K, [T] float64 in 0..1.

    0 is one expert with all the weight, 1 is equal weight for all K. It is 0 for K = 1 and for zero
    weights.

    Source: arXiv:2511.10054, TAE.

    Args:
        weights: [T, K] float, >= 0, the gate weights of the chosen experts; need not sum to 1.
        temperature: the weights are raised to its inverse; above 1 they are more even.
    """
    n_tokens, top_k = weights.shape
    if top_k == 1:
        return np.zeros(n_tokens)
    gates = np.maximum(weights.astype(np.float64), 0.0)
    if temperature != 1:
        # Of the heaviest, so that a low temperature does not underflow.
        heaviest = gates.max(axis=1, keepdims=True)
        gates = np.divide(gates, heaviest, out=np.zeros_like(gates), where=heaviest > 0)
        gates = gates ** (1 / temperature)
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


def _slots_of_sequence(missing: np.ndarray, routing: Routing) -> tuple[np.ndarray, np.ndarray]:
    """Return for each token how many slots of its sequence are missing, and present, each [T]."""
    _, member = np.unique(routing.sequence, return_inverse=True)
    n_missing = np.bincount(member, weights=missing.sum(axis=1))
    n_slots = np.bincount(member, weights=routing.present.sum(axis=1))
    return n_missing[member], n_slots[member]
