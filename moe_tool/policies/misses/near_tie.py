"""Near-ties: a missing expert just above the cut is replaced by a resident one just below it."""

import numpy as np

from moe_tool.artifacts.routing import PRIMARY, Answers, Routing, keep
from moe_tool.policies.misses.needs import WEIGHT_RULE
from moe_tool.policies.misses.protocol import MissPolicy, PolicyInputs
from moe_tool.policies.misses.score_shares import as_shares
from moe_tool.policies.misses.spec import PolicySpec, Values
from moe_tool.policies.misses.strength import share_strength
from moe_tool.policies.misses.substitution import Offers, outbid
from moe_tool.policies.parameters import Parameter, whole_number


class NearTie(MissPolicy):
    """SMoE's router (arXiv:2508.18983): bands around S, the best score that was not chosen.

    Chosen experts scoring below (1 + alpha) S are low, the others are always kept. Missing low ones
    are replaced by resident experts from (1 - alpha) S to S, the best first, or else read. The gate
    weights of the whole set are computed anew by the model's rule.
    Experts that another token of the layer call fetches in any case, since it scored them above the
    band, count as being there if `batch` says so, as published. By default they do not, so that an
    answer does not depend on the batch.
    """

    needs_router = "scores"

    def __init__(self, inputs: PolicyInputs, values: Values) -> None:
        assert inputs.reweigh is not None
        self.alpha, self.reweigh = values["alpha"], inputs.reweigh
        self.sees_batch = bool(values["batch"])
        self.scores_are_logits = inputs.scores_are_logits

    def describe(self) -> str:
        return (
            "near-tie: an expert in memory that scored nearly as high answers a missing one, "
            f"text may differ (within {self.alpha:.0%} of the best score not chosen)"
            + "; what others of a batch fetch counts as there, so text depends on them"
            * self.sees_batch
        )

    def decide(self, routing: Routing, resident: np.ndarray) -> Answers:
        n_experts = resident.shape[1]
        if self.alpha <= 0 or n_experts <= routing.index.shape[1]:
            return keep(routing)
        assert routing.score is not None, "the policy asked for it"
        score = as_shares(routing.score, are_logits=self.scores_are_logits)  # [T, E]
        is_chosen = routing.is_wanted(n_experts)
        limit = np.where(is_chosen, -np.inf, score).max(axis=1, keepdims=True)  # [T, 1]
        own = np.take_along_axis(score, routing.index, axis=1)  # [T, K]
        is_low = own < (1 + self.alpha) * limit
        is_there = resident[PRIMARY]
        if self.sees_batch:
            is_there = is_there.copy()
            is_there[routing.index[routing.present & ~is_low]] = True
        gives_way = routing.present & is_low & ~is_there[routing.index]
        may_come = ~is_chosen & is_there & (score > (1 - self.alpha) * limit)
        bid = np.where(may_come, score, -np.inf)
        offers = Offers(own=own, may_go=gives_way, bid=bid, floor=np.full_like(own, -np.inf))
        return outbid(routing, offers, self.reweigh)


BAND_PARAMETERS = {
    "alpha": Parameter(
        help="width of the bands around the best score that was not chosen", default=0.3
    ),
}
SPEC = PolicySpec(
    name="near-tie",
    summary="in a near-tie, a resident expert that was nearly chosen",
    make=NearTie,
    inert="alpha=0",
    fires="alpha=1",
    parameters=BAND_PARAMETERS
    | {
        "batch": whole_number(
            "1: an expert that another token of the batch fetches in any case may answer too, so "
            "that text depends on the batch",
            default=0,
            least=0,
            most=1,
        )
    },
    needs=(WEIGHT_RULE,),
    strength=share_strength("alpha"),
    source="SMoE, arXiv:2508.18983",
)
