"""The best resident buddy of a missing expert answers (BuddyMoE)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_tool.artifacts.buddy_map import LayerBuddies
from moe_tool.artifacts.routing import Answers, Routing, keep
from moe_tool.policies.misses.gates import GATE_PARAMETERS, open_slots
from moe_tool.policies.misses.needs import BUDDIES, GATES
from moe_tool.policies.misses.protocol import MissPolicy, PolicyInputs
from moe_tool.policies.misses.spec import PolicySpec, Values
from moe_tool.policies.misses.substitution import Pick, substitute
from moe_tool.policies.parameters import Parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class BuddyTable:
    """One layer's buddy lists as arrays; lists shorter than B are padded with -1."""

    expert: np.ndarray
    """[E, B] int64, best first"""
    scale: np.ndarray
    """[E, B] float32: factor on the gate weight"""


def buddy_tables(layers: Sequence[LayerBuddies]) -> dict[int, BuddyTable]:
    """Return the lists of each decoder layer as arrays."""
    tables = {}
    for layer in layers:
        longest = max((len(candidates) for candidates in layer.buddies), default=0)
        expert = np.full((len(layer.buddies), longest), -1, dtype=np.int64)
        scale = np.zeros(expert.shape, dtype=np.float32)
        for wanted, candidates in enumerate(layer.buddies):
            expert[wanted, : len(candidates)] = [buddy.expert for buddy in candidates]
            scale[wanted, : len(candidates)] = [buddy.scale for buddy in candidates]
        tables[layer.layer] = BuddyTable(expert=expert, scale=scale)
    return tables


class Buddy(MissPolicy):
    """Replaces a missing expert by the first of its buddies that is resident and free.

    Source: arXiv:2511.10054. Priority psi = rank * (1 + eta * z): rank is (B - r) / B for the r-th
    of B buddies, z this token's router logit of the buddy, scaled to 0..1 over the layer.
    Deviations: the paper's first factor is the co-activation frequency, which has no counterpart in
    other similarities (they can be negative); its third factor, for hops between devices, is 1 on
    one device; and the buddy's output is multiplied by the fitted scale (1 in the paper).
    """

    def __init__(self, inputs: PolicyInputs, values: Values) -> None:
        assert inputs.gates is not None and inputs.buddies is not None
        self.gates, self.eta = inputs.gates.tuned(values), values["eta"]
        self.tables = buddy_tables(inputs.buddies)
        self.needs_router = "logits" if self.eta else "nothing"

    def describe(self) -> str:
        return (
            "buddy: the best resident stand-in answers a missing expert, "
            f"text may differ ({self.gates.describe()})"
        )

    def decide(self, routing: Routing, resident: np.ndarray) -> Answers:
        """Return the routing with buddies in open slots; an expert without one is fetched."""
        slots = open_slots(self.gates, routing, resident)
        if slots is None:
            return keep(routing)
        table = self.tables[routing.layer]
        n_listed = table.expert.shape[1]
        if n_listed == 0:
            return keep(routing)
        rank = (n_listed - np.arange(n_listed)) / n_listed  # [B]

        def pick(token: np.ndarray, position: np.ndarray, free: np.ndarray) -> Pick:
            wanted = routing.index[token, position]
            candidates = table.expert[wanted]  # [n, B]
            row = np.arange(token.size)
            usable = (candidates >= 0) & free[row[:, None], candidates]
            priority = np.broadcast_to(rank, candidates.shape)
            if self.eta:
                relative = _relative_logits(routing, token)  # [n, E]
                priority = rank * (1 + self.eta * relative[row[:, None], candidates])
            best = np.where(usable, priority, -np.inf).argmax(axis=1)  # the earlier one of equals
            chosen = np.where(usable[row, best], candidates[row, best], -1)
            return Pick(expert=chosen, scale=table.scale[wanted, best])

        return substitute(routing, resident, slots, pick)


def _relative_logits(routing: Routing, token: np.ndarray) -> np.ndarray:
    assert routing.logits is not None, "the policy asked for logits"
    logits = routing.logits[token].astype(np.float32)  # [n, E]
    low, high = logits.min(axis=1, keepdims=True), logits.max(axis=1, keepdims=True)
    relative: np.ndarray = (logits - low) / np.where(high > low, high - low, 1)
    return relative


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
    },
    needs=(BUDDIES, GATES),
    source="BuddyMoE, arXiv:2511.10054",
)
