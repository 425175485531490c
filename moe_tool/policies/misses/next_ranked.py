"""Re-routing of a token to its next-ranked resident experts, weighed by the model's rule."""

from dataclasses import replace

import numpy as np

from moe_tool.artifacts.routing import Answers, Routing, keep
from moe_tool.policies.misses.gates import GATE_PARAMETERS, OpenSlots, open_slots
from moe_tool.policies.misses.needs import GATES, WEIGHT_RULE
from moe_tool.policies.misses.protocol import MissPolicy, PolicyInputs
from moe_tool.policies.misses.spec import PolicySpec, Values
from moe_tool.policies.misses.substitution import Pick, substitute


class NextRanked(MissPolicy):
    """Replaces a missing expert by the resident one that the token's router ranks next.

    The gate weights of re-routed tokens are computed anew by the model's rule. If residents run
    out, a token gets fewer experts (eMoE, arXiv:2503.06823); its heaviest is fetched if it had none
    at all. An expert whose selection score is -inf (outside the token's expert groups) is no
    candidate.
    """

    needs_router = "scores"

    def __init__(self, inputs: PolicyInputs, values: Values) -> None:
        assert inputs.gates is not None and inputs.reweigh is not None
        self.gates, self.reweigh = inputs.gates.tuned(values), inputs.reweigh

    def describe(self) -> str:
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

        answers = substitute(routing, resident, slots, pick)
        expert, weight = answers.expert, answers.weight
        present = routing.present & ~_left_out(routing, slots, expert)
        is_other = (expert != routing.index) | (present != routing.present)
        moved = np.flatnonzero(is_other.any(axis=1))
        if moved.size:
            weight[moved] = self.reweigh[routing.layer](
                routing.logits[moved], expert[moved], present[moved]
            )
        return replace(answers, present=present)


def _left_out(routing: Routing, slots: OpenSlots, expert: np.ndarray) -> np.ndarray:
    """Return the open slots for which no resident was left, within the gates' limit, [T, K]
    bool."""
    order = slots.order  # by gate weight
    is_replaced = np.take_along_axis(expert != routing.index, order, axis=1)
    is_left = np.take_along_axis(slots.open, order, axis=1) & ~is_replaced
    n_replaced = is_replaced.sum(axis=1, keepdims=True)
    is_left &= n_replaced + np.cumsum(is_left, axis=1) <= slots.limit
    is_empty = is_left | ~np.take_along_axis(routing.present, order, axis=1)
    is_left[is_empty.all(axis=1), 0] = False  # a token with nothing else reads its heaviest
    found: np.ndarray = np.empty_like(is_left)
    np.put_along_axis(found, order, is_left, axis=1)
    return found


SPEC = PolicySpec(
    name="next-ranked",
    summary="the resident expert that this token's router ranks next, the whole set weighed anew "
    "by the model's rule; where residents run out the set is smaller",
    make=NextRanked,
    inert="rho=0",
    parameters=GATE_PARAMETERS,
    needs=(GATES, WEIGHT_RULE),
    source="the fallback of eMoE, arXiv:2503.06823, and the substitute of SMoE, arXiv:2508.18983",
)
