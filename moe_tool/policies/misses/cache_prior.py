"""Cache prior: resident experts get a bonus on the router's scores before the top K are chosen."""

import numpy as np

from moe_tool.artifacts.routing import PRIMARY, Answers, Routing, keep
from moe_tool.policies.misses.needs import WEIGHT_RULE
from moe_tool.policies.misses.protocol import MissPolicy, PolicyInputs
from moe_tool.policies.misses.spec import PolicySpec, Values
from moe_tool.policies.misses.strength import share_strength
from moe_tool.policies.misses.substitution import Offers, outbid
from moe_tool.policies.parameters import Parameter, whole_number


class CachePrior(MissPolicy):
    """The cache prior of Mixture of Cache-Conditional Experts (arXiv:2412.00099).

    lambda times the range of the router's scores is added to the scores of resident experts, the
    best K are chosen anew, and weighed by the model's rule on the original scores. A token's J best
    experts are always kept.
    Deviations: the range is that of the token's own scores, not a mean over earlier tokens, so that
    an answer depends on routing and residency alone. Scores are the model's selection scores, even
    if these are not the logits.
    """

    needs_router = "scores"

    def __init__(self, inputs: PolicyInputs, values: Values) -> None:
        assert inputs.reweigh is not None
        self.share, self.n_kept = values["lambda"], int(values["keep"])
        self.reweigh = inputs.reweigh

    def describe(self) -> str:
        return (
            "cache-prior: experts in memory are ranked higher, text may differ "
            f"(by {self.share:.0%} of the range of the router's scores)"
        )

    def decide(self, routing: Routing, resident: np.ndarray) -> Answers:
        """Return the routing with missing experts outranked by resident ones."""
        here = resident[PRIMARY]
        if self.share <= 0 or here.all():
            return keep(routing)
        assert routing.score is not None, "the policy asked for it"
        score = routing.score.astype(np.float64)  # [T, E]
        own = np.take_along_axis(score, routing.index, axis=1)  # [T, K]
        may_go = routing.present & ~here[routing.index] & ~self._best(routing, own)
        may_come = here & ~routing.is_wanted(len(here)) & np.isfinite(score)
        raised = np.where(may_come, score + self.share * _range(score)[:, None], -np.inf)
        offers = Offers(own=own, may_go=may_go, bid=raised, floor=own)
        return outbid(routing, offers, self.reweigh)

    def _best(self, routing: Routing, own: np.ndarray) -> np.ndarray:
        """Return which slots are among a token's best ones, [T, K] bool."""
        order = np.argsort(np.where(routing.present, -own, np.inf), axis=1, kind="stable")
        found = np.zeros(own.shape, dtype=bool)
        np.put_along_axis(found, order[:, : self.n_kept], True, axis=1)
        return found


def _range(score: np.ndarray) -> np.ndarray:
    """Return the distance of each token's best and worst finite scores, [T]."""
    finite = np.isfinite(score)
    highest = np.where(finite, score, -np.inf).max(axis=1, initial=-np.inf)
    lowest = np.where(finite, score, np.inf).min(axis=1, initial=np.inf)
    found: np.ndarray = np.where(finite.any(axis=1), highest - lowest, 0.0)
    return found


SPEC = PolicySpec(
    name="cache-prior",
    summary="a resident expert that outranks it once all resident ones get a bonus on the router's "
    "scores, the whole set weighed anew by the model's rule",
    make=CachePrior,
    inert="lambda=0",
    fires="lambda=1",
    parameters={
        "lambda": Parameter(
            help="bonus of resident experts, as a share of the range of the token's scores",
            default=0.2,
        ),
        "keep": whole_number(
            "best experts of a token that are always kept", default=1, most=1024, least=0
        ),
    },
    needs=(WEIGHT_RULE,),
    strength=share_strength("lambda"),
    source="Mixture of Cache-Conditional Experts, arXiv:2412.00099",
)
