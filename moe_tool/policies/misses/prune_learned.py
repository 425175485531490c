"""Pruning of a token's experts, resident or not, by a trained mask router."""

import math

import numpy as np

from moe_tool.artifacts.routing import Answers, Routing, keep, leave_out
from moe_tool.policies.misses.needs import MASK_ROUTER, SEVERAL_EXPERTS
from moe_tool.policies.misses.protocol import MissPolicy, PolicyInputs, read_quantile
from moe_tool.policies.misses.prune import largest_rate, share_of_light
from moe_tool.policies.misses.spec import PolicySpec, Values
from moe_tool.policies.misses.strength import share_strength
from moe_tool.policies.parameters import Parameter


class PruneLearned(MissPolicy):
    """MC#'s top-any pruning (arXiv:2510.10962): a token keeps its j heaviest experts, where a
    router trained on the layer's input chooses j.

    Gate weights are unchanged. The same routers serve every rate: the threshold of the slot scores
    is one number for all layers, tabulated against the rate on held-out tokens.
    """

    def __init__(self, inputs: PolicyInputs, values: Values) -> None:
        assert inputs.pruning is not None
        self.rate = _rate(values, inputs)
        share = share_of_light(inputs, "prune:learned", self.rate)
        offset = read_quantile(np.array(inputs.pruning.offsets), share)
        self.offset = -math.inf if share == 0 else offset  # -inf keeps all slots

    def describe(self) -> str:
        return (
            f"prune:learned: about {self.rate:.0%} of a token's experts are left out, as its "
            "trained routers say, text may differ"
        )

    def decide(self, routing: Routing, resident: np.ndarray) -> Answers:
        """Return the routing with the pruned slots empty."""
        if np.isneginf(self.offset):
            return keep(routing)
        assert routing.worth is not None, "the mask router did not answer"
        order = np.argsort(-routing.weight, axis=1, kind="stable")  # [T, K]
        kept = n_kept(routing.worth, self.offset)  # [T]
        is_left_out = np.empty(order.shape, dtype=bool)
        np.put_along_axis(is_left_out, order, np.arange(order.shape[1]) >= kept[:, None], axis=1)
        return leave_out(routing, is_left_out)


def n_kept(worth: np.ndarray, offset: float) -> np.ndarray:
    """Return the number of heaviest experts that each token keeps, [T] int64 from 1 to K: the
    pattern of the highest logit, the shortest of equals.

    The offset is subtracted from each slot score [T, K-1]. A higher one never keeps more: two
    patterns of j < j' experts differ by (j' - j) * offset.
    """
    logits = np.cumsum(worth.astype(np.float64) - offset, axis=1)
    patterns = np.concatenate([np.zeros((len(worth), 1)), logits], axis=1)  # [T, K]
    kept: np.ndarray = patterns.argmax(axis=1) + 1
    return kept


def rate_offsets(worth: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Return the offset at which each share [n] of the slots after the heaviest is dropped, [n]
    float64, both rising, for slot scores [T, K-1] of tokens of all layers."""
    lowest, highest = float(worth.min()) - 1.0, float(worth.max()) + 1.0
    found = []
    for share in shares:
        low, high = lowest, highest
        for _ in range(40):
            middle = (low + high) / 2
            left_out = 1 - (n_kept(worth, middle) - 1).mean() / worth.shape[1]
            low, high = (middle, high) if left_out < share else (low, middle)
        found.append(lowest if share <= 0 else highest if share >= 1 else high)
    result: np.ndarray = np.maximum.accumulate(np.array(found))
    return result


def _rate(values: Values, inputs: PolicyInputs) -> float:
    assert inputs.pruning is not None
    return inputs.pruning.rate if values["rate"] < 0 else values["rate"]


def _controls(values: Values, inputs: PolicyInputs) -> tuple[str, ...] | None:
    """Return controls that drop as many experts: by the ratio of gate weights, and at random."""
    if inputs.pruning is None:
        return None
    rate = _rate(values, inputs)
    share = min(1.0, rate / largest_rate(inputs))
    return (f"prune:share={share:.6g}", f"prune:random:rate={rate:.6g}")


SPEC = PolicySpec(
    name="prune:learned",
    summary="(hits too) nothing, where a router trained by `tune pruning` finds it not worth it",
    make=PruneLearned,
    inert="rate=0",
    acts_on_hits=True,
    parameters={
        "rate": Parameter(
            help="share of the chosen experts that is left out; -1: the one trained for",
            default=-1,
            least=-1,
        )
    },
    needs=(SEVERAL_EXPERTS, MASK_ROUTER),
    strength=share_strength("rate", most=largest_rate),
    in_controls=False,
    controls=_controls,
    source="MC#, arXiv:2510.10962",
)
