"""Who answers when a wanted expert is not in the fast tier."""

from collections.abc import Callable

from moe_tool.errors import UsageError
from moe_tool.policies.misses.buddy import Buddy, buddy_tables
from moe_tool.policies.misses.drop import Drop
from moe_tool.policies.misses.exact import Exact
from moe_tool.policies.misses.gates import Gates
from moe_tool.policies.misses.next_ranked import NextRanked
from moe_tool.policies.misses.protocol import MissPolicy, PolicyInputs, Reweigh
from moe_tool.policies.misses.random_resident import RandomResident


def _exact(inputs: PolicyInputs) -> MissPolicy:
    return Exact()


def _drop(inputs: PolicyInputs) -> MissPolicy:
    return Drop(gates=_gates(inputs, "drop"))


def _buddy(inputs: PolicyInputs) -> MissPolicy:
    if inputs.buddies is None:
        raise UsageError(
            "--policy buddy: this bundle has no buddies", hint="pack it again with --buddies FILE"
        )
    return Buddy(
        gates=_gates(inputs, "buddy"),
        tables=buddy_tables(inputs.buddies),
        logit_weight=inputs.logit_weight,
    )


def _random(inputs: PolicyInputs) -> MissPolicy:
    return RandomResident(gates=_gates(inputs, "random"), seed=inputs.seed)


def _next_ranked(inputs: PolicyInputs) -> MissPolicy:
    if inputs.reweigh is None:
        raise UsageError(
            "--policy next-ranked: the rule by which this model weighs its experts is not known",
            hint="take --policy buddy, random, drop or exact",
        )
    return NextRanked(gates=_gates(inputs, "next-ranked"), reweigh=inputs.reweigh)


def _gates(inputs: PolicyInputs, name: str) -> Gates:
    if inputs.gates is None:
        raise UsageError(
            f"--policy {name}: this bundle has no buddies, so the gates' thresholds are not known",
            hint="pack it again with --buddies FILE, or add --no-gates",
        )
    return inputs.gates


MISS_POLICIES: dict[str, Callable[[PolicyInputs], MissPolicy]] = {
    "exact": _exact,
    "buddy": _buddy,
    "drop": _drop,
    "random": _random,
    "next-ranked": _next_ranked,
}
"""Every miss policy by the name that `--policy` takes.

A builder raises UsageError where its policy cannot be made from the inputs.
"""

__all__ = ["MISS_POLICIES", "Gates", "MissPolicy", "PolicyInputs", "Reweigh"]
