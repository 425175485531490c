"""Pruning of a token's light experts, resident or not, by gate weight relative to its heaviest."""

import numpy as np

from moe_tool.artifacts.routing import Answers, Routing, keep, leave_out
from moe_tool.errors import UsageError
from moe_tool.policies.misses.needs import RATIO_QUANTILES
from moe_tool.policies.misses.protocol import MissPolicy, PolicyInputs, read_quantile
from moe_tool.policies.misses.spec import PolicySpec, Values
from moe_tool.policies.misses.strength import share_strength
from moe_tool.policies.parameters import Parameter


class Prune(MissPolicy):
    """MC's online pruning (arXiv:2410.06270): a slot is dropped if its gate weight over the token's
    heaviest is below mu. The most important tokens of a lossily answered prompt are not pruned, as
    in the paper.

    mu is a quantile of the layer's ratios in the profile, the median in the paper. Other gate
    weights are unchanged. With more than two experts per token, which the paper does not have,
    every slot after the heaviest is judged alone.
    """

    def __init__(self, inputs: PolicyInputs, values: Values) -> None:
        self.share, self.protect = values["share"], values["protect"]
        self.limits = {at: read_quantile(each, self.share) for at, each in inputs.ratios.items()}
        """mu by decoder layer"""

    def describe(self) -> str:
        return (
            f"prune: the lightest {self.share:.0%} of the experts after a token's heaviest are "
            "left out, text may differ"
        )

    def decide(self, routing: Routing, resident: np.ndarray) -> Answers:
        limit = self.limits[routing.layer]
        if self.share == 0 or limit <= 0:
            return keep(routing)
        is_left_out = ratio_to_heaviest(routing.weight) < limit
        heaviest = routing.weight.argmax(axis=1)
        is_left_out[np.arange(len(heaviest)), heaviest] = False
        if routing.importance is not None:
            spared = most_important(routing.importance, routing.sequence, self.protect)
            is_left_out[spared] = False
        return leave_out(routing, is_left_out)


def most_important(importance: np.ndarray, sequence: np.ndarray, share: float) -> np.ndarray:
    """Return the tokens among the most important share of their sequence, rounded up, [T] bool;
    ties go to the earlier token."""
    found = np.zeros(len(importance), dtype=bool)
    for each in np.unique(sequence):
        own = np.flatnonzero(sequence == each)
        count = int(np.ceil(share * len(own)))
        found[own[np.argsort(-importance[own], kind="stable")[:count]]] = True
    return found


def token_importance(hidden: np.ndarray, received: np.ndarray) -> np.ndarray:
    """Return the importance of a prompt's tokens, [T] float32: L1 norm of the experts' inputs
    [T, H] times received attention [T], see models/attention_sums."""
    importance: np.ndarray = np.abs(hidden).sum(axis=1) * received
    return importance.astype(np.float32)


def ratio_to_heaviest(weight: np.ndarray) -> np.ndarray:
    """Return every slot's gate weight over the token's largest, [T, K] float64."""
    wide = weight.astype(np.float64)
    largest = wide.max(axis=1, keepdims=True)
    ratio: np.ndarray = np.divide(wide, largest, out=np.zeros_like(wide), where=largest > 0)
    return ratio


def largest_rate(inputs: PolicyInputs) -> float:
    """Return the slots after the heaviest as a share of all slots."""
    return (inputs.top_k - 1) / inputs.top_k


def share_of_light(inputs: PolicyInputs, name: str, rate: float) -> float:
    """Convert a share of all slots to a share of the slots after the heaviest.

    Raises:
        UsageError: it is above 1; names the policy.
    """
    most = largest_rate(inputs)
    if rate > most:
        raise UsageError(
            f"--policy {name}: a rate of {rate:g} would leave a token without experts",
            hint=f"of {inputs.top_k} experts per token {most:g} can be left out",
        )
    return min(1.0, rate / most)


SPEC = PolicySpec(
    name="prune",
    summary="(hits too) nothing, where its gate weight is small beside the token's heaviest",
    make=Prune,
    inert="share=0",
    fires="share=0.8",
    acts_on_hits=True,
    parameters={
        "share": Parameter(
            help="lightest share of the profile's slots after the heaviest, which is left out",
            default=0.5,
        ),
        "protect": Parameter(
            help="share of a prompt's tokens, the largest and most attended to, that "
            "--lossy-prefill does not prune",
            default=0.02,
        ),
    },
    needs=(RATIO_QUANTILES,),
    weighs_prompts=True,
    strength=share_strength("share"),
    in_controls=False,
    source="MC, arXiv:2410.06270",
)
