"""A token is re-routed to its next-ranked resident experts, weighed as the model would."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from moe_tool.artifacts.routing import Answers, Routing, answers_of
from moe_tool.policies.misses.gates import GATE_PARAMETERS, Gates, OpenSlots, open_slots
from moe_tool.policies.misses.needs import GATES, WEIGHT_RULE
from moe_tool.policies.misses.protocol import PolicyInputs, Reweigh, keep
from moe_tool.policies.misses.spec import PolicySpec, Values
from moe_tool.policies.misses.substitution import Pick, substitute


@dataclass(frozen=True, slots=True, kw_only=True)
class NextRanked:
    """Replaces a missing expert by the resident one that this token's router ranks next.

    The gate weights of the whole chosen set are then computed anew by the model's own rule, for the
    tokens that were re-routed alone. Where residents run out, a token gets fewer experts than it
    wants (eMoE, arXiv:2503.06823); its heaviest is fetched if it had none at all. An expert whose
    selection score is -inf (outside the token's expert groups) is no candidate.
    """

    gates: Gates
    reweigh: Mapping[int, Reweigh]
    """By decoder layer"""
    lossy: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = True
    needs_score: ClassVar[bool] = True

    def describe(self) -> str:
        """Return one line for the announcement."""
        return (
            "next-ranked: the router's next choice among resident experts answers a missing one, "
            f"text may differ ({self.gates.describe()})"
        )

    def decide(self, routing: Routing, resident: np.ndarray) -> Answers:
        """Return the routing with next-ranked experts in open slots, re-weighed."""
        slots = open_slots(self.gates, routing, resident)
        if slots is None:
            return keep(routing)
        assert routing.score is not None and routing.logits is not None, "the policy asked for them"
        score = routing.score.astype(np.float32)

        def pick(token: np.ndarray, position: np.ndarray, free: np.ndarray) -> Pick:
            ranked = np.where(free, score[token], -np.inf)  # [n, E]
            best = ranked.argmax(axis=1)  # the lower id of equals
            reachable = np.isfinite(ranked[np.arange(token.size), best])
            return Pick(expert=np.where(reachable, best, -1))

        expert = substitute(routing, resident, slots, pick).expert
        expert = _leave_out(routing, resident, slots, expert)
        weight = routing.weight.astype(np.float32)
        moved = np.flatnonzero((expert != routing.index).any(axis=1))
        if moved.size:
            weight[moved] = self.reweigh[routing.layer](routing.logits[moved], expert[moved])
        return answers_of(routing, expert, weight)


def _leave_out(
    routing: Routing, resident: np.ndarray, slots: OpenSlots, expert: np.ndarray
) -> np.ndarray:
    """Return the answers without the open slots for which no resident was left, as far as the gates
    let a token's slots be answered otherwise."""
    ranked_open = np.take_along_axis(slots.open, slots.order, axis=1)  # [T, K] by gate weight
    ranked = np.take_along_axis(expert, slots.order, axis=1)
    wanted = np.take_along_axis(routing.index, slots.order, axis=1)
    n_replaced = (ranked != wanted).sum(axis=1, keepdims=True)
    is_left = ranked_open & (ranked == wanted)
    is_left &= n_replaced + np.cumsum(is_left, axis=1) <= slots.limit
    nothing = is_left.all(axis=1)
    is_left[nothing, 0] = False
    result = np.empty_like(expert)
    np.put_along_axis(result, slots.order, np.where(is_left, -1, ranked), axis=1)
    return result


def _make(inputs: PolicyInputs, values: Values) -> NextRanked:
    assert inputs.gates is not None and inputs.reweigh is not None
    return NextRanked(gates=inputs.gates.tuned(values), reweigh=inputs.reweigh)


SPEC = PolicySpec(
    name="next-ranked",
    summary="the resident expert that this token's router ranks next, the whole set weighed anew "
    "by the model's rule; where residents run out the set is smaller",
    make=_make,
    inert="rho=0",
    parameters=GATE_PARAMETERS,
    needs=(GATES, WEIGHT_RULE),
    source="the fallback of eMoE, arXiv:2503.06823, and the substitute of SMoE, arXiv:2508.18983",
)
