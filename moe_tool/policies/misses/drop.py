"""A missing expert is left out."""

import numpy as np

from moe_tool.artifacts.routing import Answers, Routing, keep, leave_out
from moe_tool.policies.misses.gates import GATE_PARAMETERS, open_slots
from moe_tool.policies.misses.needs import GATES
from moe_tool.policies.misses.protocol import MissPolicy, PolicyInputs
from moe_tool.policies.misses.spec import PolicySpec, Values


class Drop(MissPolicy):
    """Leaves a slot empty; the remaining gate weights are not renormalised."""

    def __init__(self, inputs: PolicyInputs, values: Values) -> None:
        assert inputs.gates is not None
        self.gates = inputs.gates.tuned(values)

    def describe(self) -> str:
        return f"drop: a missing expert is left out, text may differ ({self.gates.describe()})"

    def decide(self, routing: Routing, resident: np.ndarray) -> Answers:
        """Return the routing with open slots empty, the heaviest ones first."""
        slots = open_slots(self.gates, routing, resident)
        if slots is None:
            return keep(routing)
        ranked = np.take_along_axis(slots.open, slots.order, axis=1)  # [T, K] by gate weight
        ranked &= np.cumsum(ranked, axis=1) <= slots.limit
        dropped = np.zeros_like(ranked)
        np.put_along_axis(dropped, slots.order, ranked, axis=1)
        return leave_out(routing, dropped)


SPEC = PolicySpec(
    name="drop",
    summary="nothing",
    make=Drop,
    inert="rho=0",
    parameters=GATE_PARAMETERS,
    needs=(GATES,),
    source="a control of buddy",
)
