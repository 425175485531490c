"""Near-ties: a missing expert just above the cut is replaced by a resident one just below it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from moe_tool.artifacts.routing import PRIMARY, Answers, Routing, keep
from moe_tool.policies.misses.needs import WEIGHT_RULE
from moe_tool.policies.misses.protocol import PolicyInputs, Reweigh, as_shares
from moe_tool.policies.misses.spec import PolicySpec, Values
from moe_tool.policies.misses.strength import ShareStrength
from moe_tool.policies.parameters import Parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class NearTie:
    """SMoE's router (arXiv:2508.18983): bands around S, the best score that was not chosen.

    Chosen experts scoring below (1 + alpha) S are low, the others are always kept. Missing low ones
    are replaced by resident experts from (1 - alpha) S to S, the best first, or else read. The gate
    weights of the whole set are computed anew by the model's rule.
    Deviation: experts that another token of the batch fetches are no candidates, so that an answer
    does not depend on the batch.
    """

    alpha: float
    reweigh: Mapping[int, Reweigh]
    """Decoder layer -> gate weight rule"""
    scores_are_logits: bool
    """Whether the selection scores are logits"""
    lossy: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = True
    needs_score: ClassVar[bool] = True

    def describe(self) -> str:
        """Return one line for the announcement."""
        return (
            "near-tie: an expert in memory that scored nearly as high answers a missing one, "
            f"text may differ (within {self.alpha:.0%} of the best score not chosen)"
        )

    def decide(self, routing: Routing, resident: np.ndarray) -> Answers:
        """Return the routing with near-ties swapped."""
        n_experts = resident.shape[1]
        top_k = routing.index.shape[1]
        if self.alpha <= 0 or n_experts <= top_k:
            return keep(routing)
        assert routing.score is not None and routing.logits is not None, "the policy asked for them"
        score = as_shares(routing.score, are_logits=self.scores_are_logits)  # [T, E]
        every = np.arange(len(score))[:, None]
        is_chosen = routing.is_wanted(n_experts)
        limit = np.where(is_chosen, -np.inf, score).max(axis=1, keepdims=True)  # [T, 1]
        own = score[every, routing.index]  # [T, K]
        gives_way = routing.present & ~resident[PRIMARY][routing.index]
        gives_way &= own < (1 + self.alpha) * limit
        may_come = ~is_chosen & resident[PRIMARY] & (score > (1 - self.alpha) * limit)
        ranked = np.argsort(np.where(may_come, -score, np.inf), axis=1, kind="stable")
        n_coming = may_come.sum(axis=1)
        expert = routing.index.copy()
        order = np.argsort(np.where(gives_way, own, np.inf), axis=1, kind="stable")
        for place in range(top_k):  # the lowest replaceable score first
            position = order[:, place]
            moves = gives_way[every[:, 0], position] & (place < n_coming)
            token = np.flatnonzero(moves)
            expert[token, position[token]] = ranked[token, place]
        moved = np.flatnonzero((expert != routing.index).any(axis=1))
        if not moved.size:
            return keep(routing)
        weight = routing.weight.astype(np.float32)
        weight[moved] = self.reweigh[routing.layer](
            routing.logits[moved], expert[moved], routing.present[moved]
        )
        return replace(keep(routing), expert=expert, weight=weight)


def _make(inputs: PolicyInputs, values: Values) -> NearTie:
    assert inputs.reweigh is not None
    return NearTie(
        alpha=values["alpha"],
        reweigh=inputs.reweigh,
        scores_are_logits=inputs.scores_are_logits,
    )


SPEC = PolicySpec(
    name="near-tie",
    summary="in a near-tie, a resident expert that was nearly chosen",
    make=_make,
    inert="alpha=0",
    fires="alpha=1",
    parameters={
        "alpha": Parameter(
            help="width of the bands around the best score that was not chosen", default=0.3
        )
    },
    needs=(WEIGHT_RULE,),
    strength=ShareStrength(parameter="alpha"),
    source="SMoE, arXiv:2508.18983",
)
