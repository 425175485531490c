"""Policies that `simulate` replays without being asked for."""

from moe_tool.policies.eviction import EVICTION
from moe_tool.simulator.simulate import default_choices, replayed_in_python


def test_they_are_all_but_those_that_python_has_to_replay() -> None:
    chosen = {choice.spec.name for choice in default_choices()}
    assert chosen.isdisjoint(replayed_in_python())
    assert chosen | set(replayed_in_python()) == set(EVICTION)
