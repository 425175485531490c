"""Random pruning of a token's experts: the control that a pruning rule has to beat."""

import numpy as np

from moe_tool.artifacts.routing import Answers, Routing, leave_out
from moe_tool.policies.misses.needs import SEVERAL_EXPERTS
from moe_tool.policies.misses.protocol import MissPolicy, PolicyInputs
from moe_tool.policies.misses.prune import share_of_light
from moe_tool.policies.misses.random_draw import draw_uniform
from moe_tool.policies.misses.spec import PolicySpec, Values
from moe_tool.policies.parameters import Parameter


class PruneRandom(MissPolicy):
    """Drops every slot after the heaviest with the same probability, by a hash of seed and
    routing."""

    def __init__(self, inputs: PolicyInputs, values: Values) -> None:
        self.share, self.seed = share_of_light(inputs, "prune:random", values["rate"]), inputs.seed

    def describe(self) -> str:
        return (
            f"prune:random: {self.share:.0%} of the experts after a token's heaviest are left out "
            f"at random, text may differ (seed {self.seed})"
        )

    def decide(self, routing: Routing, resident: np.ndarray) -> Answers:
        is_left_out = draw_uniform(routing, self.seed) < self.share  # [T, K]
        heaviest = routing.weight.argmax(axis=1)
        is_left_out[np.arange(len(heaviest)), heaviest] = False
        return leave_out(routing, is_left_out)


SPEC = PolicySpec(
    name="prune:random",
    summary="(hits too) nothing, at random, but never a token's heaviest",
    make=PruneRandom,
    inert="rate=0",
    acts_on_hits=True,
    parameters={
        "rate": Parameter(help="share of the chosen experts that is left out", default=0.2)
    },
    needs=(SEVERAL_EXPERTS,),
    in_controls=False,
    source="the control of the other two",
)
