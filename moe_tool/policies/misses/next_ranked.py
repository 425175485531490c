"""A token is re-routed to its next-ranked resident experts, weighed as the model would."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from moe_tool.artifacts.routing import Answers, Routing
from moe_tool.policies.misses.gates import Gates, open_slots
from moe_tool.policies.misses.protocol import Reweigh, keep
from moe_tool.policies.misses.substitution import Pick, substitute


@dataclass(frozen=True, slots=True, kw_only=True)
class NextRanked:
    """Replaces a missing expert by the resident one that this token's router ranks next.

    The gate weights of the whole chosen set are then computed anew by the model's own rule, for the
    tokens that were re-routed alone. Where residents run out, the expert is fetched. An expert
    whose selection score is -inf (outside the token's expert groups) is no candidate.
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

        answers = substitute(routing, resident, slots, pick)
        moved = np.flatnonzero((answers.expert != routing.index).any(axis=1))
        if moved.size:
            weights = self.reweigh[routing.layer](routing.logits[moved], answers.expert[moved])
            answers.weight[moved] = weights
        return answers
