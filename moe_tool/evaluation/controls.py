"""Which policies one table compares."""

from moe_tool.runtime.policy_choice import EXACT

CONTROLS = (EXACT, "priced", "replica", "near-tie", "buddy", "next-ranked", "random", "drop")


def policies_to_run(policy: str, *, controls: bool) -> tuple[str, ...]:
    """Return the policies of a table, `policy` among them, each once.

    Exact comes first: it shows what the same residency costs in bytes when nothing is answered by
    something else. Random and drop are what a choice of stand-in has to beat, next-ranked what it
    has to beat to be worth its map.

    Args:
        policy: the one that was asked for.
        controls: whether its controls run too.
    """
    if not controls:
        return (policy,)
    return tuple(dict.fromkeys((EXACT, policy, *CONTROLS)))
