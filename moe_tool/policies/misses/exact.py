"""Exact: every missing expert is fetched."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from moe_tool.artifacts.routing import Answers, Routing, keep
from moe_tool.policies.misses.protocol import PolicyInputs, RouterNeed
from moe_tool.policies.misses.spec import PolicySpec, Values


@dataclass(frozen=True, slots=True, kw_only=True)
class Exact:
    """Policy that answers every miss by the expert itself."""

    needs_router: ClassVar[RouterNeed] = "nothing"

    def describe(self) -> str:
        return "exact: every missing expert is read from the bundle"

    def decide(self, routing: Routing, resident: np.ndarray) -> Answers:
        return keep(routing)


def _make(inputs: PolicyInputs, values: Values) -> Exact:
    return Exact()


SPEC = PolicySpec(
    name="exact",
    summary="itself, read from the bundle while the layer's resident experts compute",
    make=_make,
    inert="",
    fires=None,
)
