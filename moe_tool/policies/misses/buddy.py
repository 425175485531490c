"""The best resident buddy of a missing expert answers (BuddyMoE)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_tool.artifacts.buddy_map import LayerBuddies
from moe_tool.artifacts.routing import Answers, Routing, keep
from moe_tool.errors import UsageError
from moe_tool.policies.misses.gates import GATE_PARAMETERS, open_slots
from moe_tool.policies.misses.needs import BUDDIES, GATES
from moe_tool.policies.misses.protocol import MissPolicy, PolicyInputs
from moe_tool.policies.misses.spec import PolicySpec, Values
from moe_tool.policies.misses.substitution import Pick, substitute
from moe_tool.policies.parameters import Parameter, changed_words, whole_number


@dataclass(frozen=True, slots=True, kw_only=True)
class BuddyTable:
    """One layer's buddy lists as arrays; lists shorter than B are padded with -1."""

    expert: np.ndarray
    """[E, B] int64, best first"""
    scale: np.ndarray
    """[E, B] float32: factor on the gate weight"""
    similarity: np.ndarray
    """[E, B] float64: similarity by the lists' measure"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Priority:
    """BuddyMoE's psi (arXiv:2511.10054): q * (1 + eta * z) * (1 - kappa * hops)."""

    eta: float
    kappa: float
    hops: np.ndarray | None = None
    """[E] hops to each expert's device; None: 0"""

    def of(self, q: np.ndarray, relative: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """Return the priorities of candidates, [n, B] float64.

        Args:
            q: [n, B] co-activation frequencies, or ranks.
            relative: [n, B] router logits of the candidates, scaled to 0..1 over the layer.
            candidates: [n, B] experts.
        """
        near = 1.0 if self.hops is None else 1 - self.kappa * self.hops[candidates]
        found: np.ndarray = q * (1 + self.eta * relative) * near
        return found


def buddy_tables(layers: Sequence[LayerBuddies]) -> dict[int, BuddyTable]:
    """Return the lists of each decoder layer as arrays."""
    tables = {}
    for layer in layers:
        longest = max((len(candidates) for candidates in layer.buddies), default=0)
        expert = np.full((len(layer.buddies), longest), -1, dtype=np.int64)
        scale = np.zeros(expert.shape, dtype=np.float32)
        similarity = np.zeros(expert.shape)
        for wanted, candidates in enumerate(layer.buddies):
            expert[wanted, : len(candidates)] = [buddy.expert for buddy in candidates]
            scale[wanted, : len(candidates)] = [buddy.scale for buddy in candidates]
            similarity[wanted, : len(candidates)] = [each.similarity for each in candidates]
        tables[layer.layer] = BuddyTable(expert=expert, scale=scale, similarity=similarity)
    return tables


class Buddy(MissPolicy):
    """Replaces a missing expert by the first of its buddies that is resident and free.

    Source: arXiv:2511.10054. The first is the one with the highest `Priority`, whose q is the
    co-activation frequency if the lists are by co-activation. Other similarities have no
    counterpart (they can be negative): there q is (B - r) / B for the r-th of B buddies.
    `buddy` multiplies a buddy's output by its listed scale; `buddy:published` does not and refuses
    other lists than co-activation's.
    """

    def __init__(self, inputs: PolicyInputs, values: Values) -> None:
        assert inputs.gates is not None and inputs.buddies is not None
        self.gates = inputs.gates.tuned(values)
        self.priority = Priority(eta=values["eta"], kappa=values["kappa"], hops=inputs.hops)
        self.is_scaled, self.has_q = values["scale"] == 1, inputs.buddies_by == "coactivation"
        if values["q"] == 1 and not self.has_q:
            raise UsageError(
                "buddy: the stand-ins of this bundle are not listed by co-activation",
                hint="make them by moe-tool buddies --by coactivation --scale none --k 16 and pack "
                "again",
            )
        self.longest = int(values["listed"])
        self.tables = buddy_tables(inputs.buddies)
        self.needs_router = "logits" if self.priority.eta else "nothing"

    def describe(self) -> str:
        scale = "" if self.is_scaled else " at its gate weight"
        return (
            f"buddy: the best resident stand-in answers a missing expert{scale}, "
            f"text may differ ({self.gates.describe()})"
        )

    def decide(self, routing: Routing, resident: np.ndarray) -> Answers:
        """Return the routing with buddies in open slots; an expert without one is fetched."""
        slots = open_slots(self.gates, routing, resident)
        if slots is None:
            return keep(routing)
        table = self.tables[routing.layer]
        n_listed = min(table.expert.shape[1], self.longest)
        if n_listed == 0:
            return keep(routing)
        rank = (n_listed - np.arange(n_listed)) / n_listed  # [B]

        def pick(token: np.ndarray, position: np.ndarray, free: np.ndarray) -> Pick:
            wanted = routing.index[token, position]
            candidates = table.expert[wanted, :n_listed]  # [n, B]
            row = np.arange(token.size)
            usable = (candidates >= 0) & free[row[:, None], candidates]
            q = table.similarity[wanted, :n_listed] if self.has_q else rank
            relative = np.zeros(candidates.shape)
            if self.priority.eta:
                relative = _relative_logits(routing, token)[row[:, None], candidates]
            priority = self.priority.of(q, relative, candidates)
            best = np.where(usable, priority, -np.inf).argmax(axis=1)  # the earlier one of equals
            chosen = np.where(usable[row, best], candidates[row, best], -1)
            return Pick(expert=chosen, scale=table.scale[wanted, best] if self.is_scaled else None)

        return substitute(routing, resident, slots, pick)


def _relative_logits(routing: Routing, token: np.ndarray) -> np.ndarray:
    assert routing.logits is not None, "the policy asked for logits"
    logits = routing.logits[token].astype(np.float32)  # [n, E]
    low, high = logits.min(axis=1, keepdims=True), logits.max(axis=1, keepdims=True)
    relative: np.ndarray = (logits - low) / np.where(high > low, high - low, 1)
    return relative


def _controls(values: Values, _: PolicyInputs) -> tuple[str, ...] | None:
    """Return the controls under the same gates, and our buddy; None if the gates are the usual."""
    gates = {name: values[name] for name in GATE_PARAMETERS}
    words = ",".join(changed_words(gates, GATE_PARAMETERS))
    if not words:
        return None
    return tuple(f"{name}:{words}" for name in ("buddy", "next-ranked", "random", "drop"))


PUBLISHED: Values = {
    "tau": 0.95,
    "rho": 3,
    "listed": 16,
    "scale": 0,
    "q": 1,
    "beta": 0.6,
    "gamma": 1,
    "eta": 0,
    "kappa": 0,
}
"""Values of the paper's tables: tau, rho and the length of lists; and the paper's rule for the gate
weight and q. The paper does not state beta, eta and kappa: these are a re-implementation's."""

SPEC = PolicySpec(
    name="buddy",
    summary="the best of its listed stand-ins that is resident and free, times its fitted scale; "
    "without one, itself",
    make=Buddy,
    inert="rho=0",
    parameters={
        **GATE_PARAMETERS,
        "eta": Parameter(
            help="weight of this token's router logit in the choice; 0 follows the lists alone",
            default=0,
            most=100,
        ),
        "kappa": Parameter(
            help="part of a stand-in's priority that each hop to its device costs; on one device "
            "there are none",
            default=0,
        ),
        "scale": whole_number(
            "1: the listed scale times the gate weight; 0: the gate weight as it is",
            default=1,
            least=0,
            most=1,
        ),
        "q": whole_number(
            "1: refuse lists that have no co-activation frequency; 0: take ranks there",
            default=0,
            least=0,
            most=1,
        ),
        "listed": whole_number(
            "stand-ins at the head of a list that may answer", default=1024, most=1024
        ),
    },
    presets={"published": PUBLISHED},
    controls=_controls,
    needs=(BUDDIES, GATES),
    source="BuddyMoE, arXiv:2511.10054",
)
