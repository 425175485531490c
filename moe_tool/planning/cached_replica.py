"""HOBBIT's candidate: `replica` over a cache of each form, with weights searched in-sample."""

from collections.abc import Sequence
from dataclasses import dataclass

from moe_tool.artifacts.simulation_report import CachePenalty
from moe_tool.budget.slots import ExpertRoom, slots_beside
from moe_tool.planning.candidate import (
    LossyAnswers,
    PackedExperts,
    TwoCaches,
)
from moe_tool.planning.hobbit_weights import search_hobbit_weights
from moe_tool.planning.model_costs import record_precision, timed_as
from moe_tool.planning.plan_sources import PlanSources
from moe_tool.planning.profile_prices import profile_prices
from moe_tool.policies.eviction import DEFAULT_EVICTION, EvictionChoice, parse_eviction
from moe_tool.policies.misses import MissChoice, PriceBook, parse_miss_policy
from moe_tool.simulator.profile_trace import Part, part_to_replay
from moe_tool.simulator.replay_replica import (
    ReplicaTrace,
    cost_of_replica,
    read_replica_trace,
    replay_replica,
)
from moe_tool.simulator.replica_answers import replica_limits

_POLICIES = tuple(
    parse_miss_policy(f"replica:{shares}")
    for shares in ("high=0.67,low=0.3", "high=0.8,low=0.2", "high=0.9,low=0.1")
)
"""Shares to try: the paper's, then milder ones that leave nothing out"""
_BESIDE = tuple(map(parse_eviction, ("lru", "lfu:halve-every=1000000", "lfu", "random")))
"""Policies that the found one is judged beside; the first lfu never halves, as the paper's"""
_MAX_ACCESSES = 100_000


def search_cached_replica(
    sources: PlanSources, experts: PackedExperts, n_slots: int, *, max_kl: float
) -> LossyAnswers | None:
    """Return the answers of `replica` with the eviction of the least penalty on the first part of
    the profile, judged on the rest.

    Two forms of HOBBIT are searched: as published, with records that begin anew with every
    sequence, and ours, whose uses are halved and of each cache's own form. The shares are the first
    that keep the limit with lru. None if none does, for mixed widths, or without room for both.
    """
    rooms = _Rooms.of(sources, experts, n_slots)
    if rooms is None:
        return None
    for policy in _POLICIES:
        try:
            first = _read(sources, policy, "in-sample")
        except ValueError:  # a token chose an expert twice, which no replay of two caches follows
            return None
        plain = replay_replica(first, DEFAULT_EVICTION, rooms.slots)
        nats = cost_of_replica(
            sources.profile, first, plain, rooms.book, experts.machine.costs
        ).nats_per_token
        if experts.nats + nats <= max_kl:
            rest = _read(sources, policy, part_to_replay(sources.profile))
            found = _search(first, rooms)
            return _judged(sources, experts, rooms, policy, found, rest, beside=_BESIDE)
    return None


def replay_cached_replica(
    sources: PlanSources,
    experts: PackedExperts,
    n_slots: int,
    *,
    policy: MissChoice,
    eviction: EvictionChoice,
) -> LossyAnswers | None:
    """Return the answers of `replica` with a given eviction policy and another number of slots;
    None without room for both forms."""
    rooms = _Rooms.of(sources, experts, n_slots)
    if rooms is None:
        return None
    rest = _read(sources, policy, part_to_replay(sources.profile))
    return _judged(sources, experts, rooms, policy, eviction, rest)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rooms:
    """Slots of both caches, and what their records cost."""

    slots: tuple[int, int]
    """Slots of the primary form and of the cheaper one"""
    replica: str
    book: PriceBook

    @property
    def ratio(self) -> float:
        """Bytes of a cheaper record over those of a primary one."""
        return self.book.record_bytes[1] / self.book.record_bytes[0]

    @classmethod
    def of(cls, sources: PlanSources, experts: PackedExperts, n_slots: int) -> "_Rooms | None":
        """Return what a run makes of `n_slots` primary slots; None if it would not have both."""
        if experts.bits == "mixed" or n_slots >= experts.n_experts:
            return None
        replica = _replica_of(sources, experts)
        book = profile_prices(sources, experts.bits, replica)
        least = experts.machine.n_slots_min
        room = ExpertRoom(
            record_bytes=book.record_bytes[0], n_experts=experts.n_experts, n_slots_min=least
        )
        found = slots_beside(
            n_slots * room.record_bytes,
            (room,),
            book.record_bytes[1],
            part=_POLICIES[0].values["part"],
            n_least=least,
        )
        if found is None:
            return None
        (whole,), cheaper = found
        return cls(slots=(whole, cheaper), replica=replica, book=book)


def _replica_of(sources: PlanSources, experts: PackedExperts) -> str:
    """Return the paper's cheaper form: a quarter of the bits, and never below two."""
    precision = record_precision(sources.profile.header, experts.bits)
    return "4" if timed_as(precision) == "native" else "2"


def _read(sources: PlanSources, policy: MissChoice, part: Part) -> ReplicaTrace:
    shape = sources.profile.header.shape
    limits = replica_limits(sources.profile, policy.values["high"], policy.values["low"])
    n_tokens = max(1, _MAX_ACCESSES // (len(shape.layers) * shape.top_k))
    return read_replica_trace(sources.profile, part, limits, max_tokens=n_tokens)


def _search(first: ReplicaTrace, rooms: _Rooms) -> EvictionChoice:
    def penalty(choice: EvictionChoice) -> float:
        return replay_replica(first, choice, rooms.slots).penalty(rooms.ratio)

    published = search_hobbit_weights(penalty, has_cheaper=True, is_reset=True)
    ours = search_hobbit_weights(penalty, has_cheaper=True, halve_every=128, is_own=True)
    return min((published, ours), key=penalty)


def _judged(
    sources: PlanSources,
    experts: PackedExperts,
    rooms: _Rooms,
    policy: MissChoice,
    eviction: EvictionChoice,
    rest: ReplicaTrace,
    beside: Sequence[EvictionChoice] = (),
) -> LossyAnswers:
    counts = {each.name: replay_replica(rest, each, rooms.slots) for each in (eviction, *beside)}
    costs, shape = experts.machine.costs, sources.profile.header.shape
    replayed = cost_of_replica(sources.profile, rest, counts[eviction.name], rooms.book, costs)
    # Every slot is computed: those left out are few.
    computed_s = costs.forward_s
    computed_s += len(shape.layers) * (costs.layer_s + shape.top_k * costs.expert_s)
    return LossyAnswers(
        policy=policy,
        replicas=rooms.replica,
        record_bytes=rooms.book.record_bytes,
        residents=None,
        caches=TwoCaches(
            eviction=eviction,
            slots=rooms.slots,
            penalties=tuple(
                CachePenalty(
                    eviction=name, reads_per_token=each.penalty(rooms.ratio) / replayed.tokens
                )
                for name, each in counts.items()
            ),
        ),
        replayed=replayed,
        tokens_per_second=1 / (computed_s + replayed.stall_s),
    )
