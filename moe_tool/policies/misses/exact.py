"""Exact: every missing expert is fetched."""

import numpy as np

from moe_tool.artifacts.routing import Answers, Routing, keep
from moe_tool.policies.misses.protocol import MissPolicy
from moe_tool.policies.misses.spec import PolicySpec


class Exact(MissPolicy):
    """Policy that answers every miss by the expert itself."""

    def describe(self) -> str:
        return "exact: every missing expert is read from the bundle"

    def decide(self, routing: Routing, resident: np.ndarray) -> Answers:
        return keep(routing)


SPEC = PolicySpec(
    name="exact",
    summary="itself, read from the bundle while the layer's resident experts compute",
    make=lambda inputs, values: Exact(),
)
