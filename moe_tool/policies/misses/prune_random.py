"""Random pruning of a token's experts: the control that a pruning rule has to beat."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from moe_tool.artifacts.routing import Answers, Routing, leave_out
from moe_tool.policies.misses.needs import SEVERAL_EXPERTS
from moe_tool.policies.misses.protocol import PolicyInputs, RouterNeed
from moe_tool.policies.misses.prune import share_of_light
from moe_tool.policies.misses.random_draw import draw_uniform
from moe_tool.policies.misses.spec import PolicySpec, Values
from moe_tool.policies.parameters import Parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneRandom:
    """Drops every slot after the heaviest with the same probability, by a hash of seed and
    routing."""

    share: float
    """Share of the slots after the heaviest that is dropped"""
    seed: int
    needs_router: ClassVar[RouterNeed] = "nothing"

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


def _make(inputs: PolicyInputs, values: Values) -> PruneRandom:
    share = share_of_light(inputs, "prune:random", values["rate"])
    return PruneRandom(share=share, seed=inputs.seed)


SPEC = PolicySpec(
    name="prune:random",
    summary="(hits too) nothing, at random, but never a token's heaviest",
    make=_make,
    inert="rate=0",
    parameters={
        "rate": Parameter(help="share of the chosen experts that is left out", default=0.2)
    },
    needs=(SEVERAL_EXPERTS,),
    acts_on_hits=True,
    in_controls=False,
    source="the control of the other two",
)
