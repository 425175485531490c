"""Choice among candidates: the fastest that keeps the limit of divergence."""

from collections.abc import Sequence

from moe_tool.artifacts.pack_plan import Bits
from moe_tool.budget.refusal import suggested_budget
from moe_tool.budget.request import MemoryRequest
from moe_tool.errors import BudgetError
from moe_tool.planning.candidate import Candidate
from moe_tool.planning.memory_account import account_of_bits
from moe_tool.planning.plan_request import PlanRequest
from moe_tool.planning.plan_sources import PlanSources
from moe_tool.planning.profile_prices import nats_of_bits

_AS_FAST = 0.98
"""Share of the best speed at which a candidate with less divergence is preferred"""


def choose(candidates: Sequence[Candidate], *, max_kl: float | None) -> Candidate | None:
    """Return the fastest candidate within the limit; among nearly as fast ones the one with the
    least expected divergence, then the first. None if all exceed the limit.

    Args:
        candidates: candidates in the order of preference.
    """
    kept = [each for each in candidates if max_kl is None or each.nats_per_token <= max_kl]
    if not kept:
        return None
    fastest = max(each.tokens_per_second for each in kept)
    near = [each for each in kept if each.tokens_per_second >= _AS_FAST * fastest]
    return min(near, key=lambda each: each.nats_per_token)


def out_of_reach(
    candidates: Sequence[Candidate], sources: PlanSources, request: PlanRequest
) -> BudgetError:
    """Return the refusal of a limit that no candidate keeps; its hint names a limit and a budget
    that work."""
    best = min(candidates, key=lambda each: each.nats_per_token)
    return BudgetError(
        f"a KL of {request.max_kl:g} nats per token is out of reach in {request.memory}: experts "
        f"at {best.experts.bits} bits alone are expected to cost {best.experts.nats:.2g}",
        hint=f"--max-kl {best.nats_per_token * 1.05:.2g}{_more(sources, request)}",
    )


def _more(sources: PlanSources, request: PlanRequest) -> str:
    """Return further hints that would keep the limit."""
    if request.average_bits is not None:
        return ", or a larger --average-bits"
    every: tuple[Bits, ...] = ("4", "8", "native") if request.bits is None else (request.bits,)
    for bits in every:
        if nats_of_bits(sources, bits) <= (request.max_kl or 0.0):
            least = account_of_bits(MemoryRequest(kind="min"), sources, request, bits).total_bytes
            return f", or --memory {suggested_budget(least)}, which {bits} bits take"
    return ", or leave --bits out"
