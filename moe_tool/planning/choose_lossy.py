"""The fastest of all ways, exact ones and lossy ones, that keeps a limit of divergence."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moe_tool.artifacts.pack_plan import Bits, PlannedForm
from moe_tool.artifacts.precision import describe_precision, replica_precisions
from moe_tool.artifacts.routing import FULL
from moe_tool.budget.refusal import suggested_budget
from moe_tool.budget.request import MemoryRequest
from moe_tool.errors import BudgetError
from moe_tool.planning.lossy_ways import LossyWay, lossy_ways
from moe_tool.planning.memory_account import account
from moe_tool.planning.plan_request import PlanRequest
from moe_tool.planning.plan_sources import PlanSources
from moe_tool.planning.profile_prices import nats_of_bits, profile_prices
from moe_tool.planning.ways_to_run import WayToRun
from moe_tool.policies.misses import parse_miss_policy

_AS_FAST = 0.98
"""What costs less is taken where it is so nearly as fast"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitedChoice:
    """What was chosen under a limit."""

    way: WayToRun
    """Its bits, with every miss read"""
    lossy: LossyWay | None
    """None: every miss is read"""
    nats_of_bits: float
    tokens_per_second: float

    @property
    def nats_per_token(self) -> float:
        """Expected divergence from the checkpoint."""
        return self.nats_of_bits if self.lossy is None else self.lossy.nats_per_token


def choose_within(
    sources: PlanSources, ways: Sequence[WayToRun], request: PlanRequest
) -> LimitedChoice:
    """Return the fastest way whose expected divergence keeps `request.max_kl`.

    Raises:
        BudgetError: the bits that fit cost more by themselves: with what would do.
    """
    assert request.max_kl is not None
    found = [choice for way in ways for choice in choices_at(sources, way, way.memory.n_slots)]
    kept = [choice for choice in found if choice.nats_per_token <= request.max_kl]
    if not kept:
        raise _out_of_reach(sources, found, request)
    return fastest_choice(kept)


def choices_at(sources: PlanSources, way: WayToRun, n_slots: int) -> list[LimitedChoice]:
    """Return one precision's ways at a number of slots; the exact one at that of `way` alone."""
    of_bits = nats_of_bits(sources, way.bits)
    found = [
        LimitedChoice(
            way=way,
            lossy=lossy,
            nats_of_bits=of_bits,
            tokens_per_second=lossy.tokens_per_second,
        )
        for lossy in lossy_ways(sources, way, n_slots)
    ]
    if n_slots == way.memory.n_slots:
        speed = way.rows[0].tokens_per_second
        exact = LimitedChoice(way=way, lossy=None, nats_of_bits=of_bits, tokens_per_second=speed)
        found.append(exact)
    return found


def fastest_choice(choices: Sequence[LimitedChoice]) -> LimitedChoice:
    """Return the fastest; of those that are nearly as fast the one that costs least."""
    fastest = max(choice.tokens_per_second for choice in choices)
    near = [choice for choice in choices if choice.tokens_per_second >= _AS_FAST * fastest]
    return min(near, key=lambda choice: choice.nats_per_token)


def planned_forms(sources: PlanSources, lossy: LossyWay) -> tuple[PlannedForm, ...]:
    """Return who is in memory in which form."""
    names = (lossy.bits, *map(describe_precision, replica_precisions(lossy.replicas)))
    sizes = profile_prices(sources, lossy.bits, lossy.replicas).record_bytes
    shape = sources.profile.header.shape
    n_experts = shape.experts * len(shape.layers)
    choice = parse_miss_policy(lossy.policy)
    reads_replicas = math.isfinite(choice.values["nats-per-mb"])
    return tuple(
        PlannedForm(
            form=name,
            record_bytes=size,
            resident=keys,
            # Full experts are read for prompts; replicas are packed only if they may be of use.
            on_disk_alone=n_experts - len(keys) if level == FULL or reads_replicas else 0,
        )
        for level, (name, size, keys) in enumerate(
            zip(names, sizes, lossy.residents.by_level, strict=True)
        )
    )


def limit_note(choice: LimitedChoice) -> str:
    """Return what is expected of a choice in one line."""
    if choice.lossy is None:
        return f"every miss is read: expected KL {choice.nats_per_token:.2g}, that of the bits"
    replayed = choice.lossy.replayed
    exact = choice.way.rows[0].tokens_per_second
    return (
        f"lossy: expected KL {choice.nats_per_token:.2g} nats per token, {choice.nats_of_bits:.2g} "
        f"of it the experts' {choice.way.bits} bits; {replayed.answered_otherwise:.1f} slots of a "
        f"token are answered by something cheaper, {replayed.hit_rate:.0%} by the expert in memory;"
        f" with every miss read it would be {exact:.2f} tokens/s. Prices, not measurements: "
        "moe-tool calibrate measures"
    )


def _out_of_reach(
    sources: PlanSources, found: Sequence[LimitedChoice], request: PlanRequest
) -> BudgetError:
    best = min(found, key=lambda choice: choice.nats_per_token)
    every: tuple[Bits, ...] = ("4", "8", "native") if request.bits is None else (request.bits,)
    for bits in every:
        if nats_of_bits(sources, bits) <= (request.max_kl or 0.0):
            least = account(
                MemoryRequest(kind="min"),
                sources.profile.header.shape,
                sources.skeleton,
                bits=bits,
                skeleton_bits=request.skeleton_bits,
                context=request.context,
            ).total_bytes
            more = f", or --memory {suggested_budget(least)}, which {bits} bits take"
            break
    else:
        more = ", or leave --bits out"
    return BudgetError(
        f"a KL of {request.max_kl:g} nats per token is out of reach in {request.memory}: experts "
        f"at {best.way.bits} bits alone are expected to cost {best.nats_of_bits:.2g}",
        hint=f"--max-kl {best.nats_per_token * 1.05:.2g}{more}",
    )
