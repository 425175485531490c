"""Random substitution by a resident expert: the control that a choice has to beat."""

import numpy as np

from moe_tool.artifacts.routing import Answers, Routing, keep
from moe_tool.policies.misses.gates import GATE_PARAMETERS, open_slots
from moe_tool.policies.misses.needs import GATES
from moe_tool.policies.misses.protocol import MissPolicy, PolicyInputs
from moe_tool.policies.misses.random_draw import hash_routing, mix
from moe_tool.policies.misses.spec import PolicySpec, Values
from moe_tool.policies.misses.substitution import Pick, substitute


class RandomResident(MissPolicy):
    """Replaces a missing expert by a uniformly random one of those resident and free.

    The draw is a hash of seed, layer, the token's routing (experts, and gate weights to three
    digits) and the slot. It needs no state and does not depend on the batch.
    """

    def __init__(self, inputs: PolicyInputs, values: Values) -> None:
        assert inputs.gates is not None
        self.gates, self.seed = inputs.gates.tuned(values), inputs.seed

    def describe(self) -> str:
        return (
            "random: a random resident expert answers a missing one, "
            f"text may differ ({self.gates.describe()}, seed {self.seed})"
        )

    def decide(self, routing: Routing, resident: np.ndarray) -> Answers:
        slots = open_slots(self.gates, routing, resident)
        if slots is None:
            return keep(routing)
        key = hash_routing(routing, self.seed)  # [T]

        def pick(token: np.ndarray, position: np.ndarray, free: np.ndarray) -> Pick:
            n_free = free.sum(axis=1)
            draw = mix(key[token] ^ position.astype(np.uint64))
            nth = draw % np.maximum(n_free, 1).astype(np.uint64)  # bias below 2**-50
            running = np.cumsum(free, axis=1)  # [n, E]
            chosen = (running > nth[:, None].astype(np.int64)).argmax(axis=1)
            return Pick(expert=np.where(n_free > 0, chosen, -1))

        return substitute(routing, resident, slots, pick)


SPEC = PolicySpec(
    name="random",
    summary="a random resident expert; a hash of seed and routing, so that a run can be repeated",
    make=RandomResident,
    inert="rho=0",
    parameters=GATE_PARAMETERS,
    needs=(GATES,),
    source="BuddyMoE's control",
)
