"""Candidate plans: packed experts and answers to misses, with their predicted figures."""

from dataclasses import dataclass

from moe_tool.artifacts.bit_prices import Allocation
from moe_tool.artifacts.pack_plan import Bits, LayerBits, Quantizer
from moe_tool.artifacts.simulation_report import CachePenalty, SimulatedRow
from moe_tool.budget.account import MemoryPlan
from moe_tool.planning.model_costs import ModelCosts
from moe_tool.policies.cheapest_residents import ResidentChoice
from moe_tool.policies.eviction import EvictionChoice
from moe_tool.policies.misses import MissChoice
from moe_tool.simulator.replay_misses import ReplayedMisses
from moe_tool.simulator.simulate import Machine


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedExperts:
    """Experts at one precision, or at mixed widths, within a memory account."""

    bits: Bits
    expert_bits: tuple[LayerBits, ...] = ()
    """Widths of all experts if `bits` is mixed"""
    allocations: tuple[Allocation, ...] = ()
    """Figures of mixed widths, then of controls with as many bits"""
    quantizer: Quantizer = "rtn"
    compute_bits: Bits
    """Precision with about the same speed of products"""
    n_experts: int
    """Experts of all layers, removed ones included"""
    n_stored: int
    """Experts with a record"""
    memory: MemoryPlan
    """Account of the budget with records of these sizes"""
    costs: ModelCosts
    machine: Machine
    nats: float
    """Expected divergence from the checkpoint in nats per token, with every miss read"""
    loss: float
    """Expected perplexity added, as a share"""

    @property
    def is_resident(self) -> bool:
        """Whether the budget holds every expert."""
        return self.memory.n_slots >= self.n_stored

    @property
    def replayed_slots(self) -> int:
        """Slots of a replay, where removed experts are accessed too."""
        return self.n_experts if self.is_resident else self.memory.n_slots


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictionReplays:
    """Replays of decoding with every miss read, under each eviction policy tried."""

    rows: tuple[SimulatedRow, ...]
    """Policies by rising bytes read, without the bound"""
    choice: EvictionChoice
    """Policy of the first row"""
    lru: SimulatedRow
    bound: SimulatedRow
    notes: tuple[str, ...] = ()
    """Reasons why policies were not tried"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoCaches:
    """Caches of a primary and of a cheaper form under one eviction policy."""

    eviction: EvictionChoice
    slots: tuple[int, int]
    """Slots of the primary form and of the cheaper one"""
    penalties: tuple[CachePenalty, ...]
    """Held-out penalty of this eviction policy, then of those beside which it was judged"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossyAnswers:
    """Replay of decoding with misses answered by something cheaper."""

    policy: MissChoice
    replicas: str
    """Cheaper forms to be packed, as `pack --replicas` takes them"""
    record_bytes: tuple[int, ...]
    """Record size of the primary form, then of each replica"""
    residents: ResidentChoice | None
    """Experts that stay in memory; None: caches hold them"""
    replayed: ReplayedMisses
    tokens_per_second: float
    robust: float = 0.0
    """Share of the worst case over domains in the use that chose the residents"""
    caches: TwoCaches | None = None
    """Caches that hold the experts; None: the residents are frozen"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Packed experts with an eviction policy or lossy answers."""

    experts: PackedExperts
    exact: EvictionReplays
    lossy: LossyAnswers | None = None
    """Lossy answers; None: every miss is read, under the first of the `exact` rows"""

    @property
    def tokens_per_second(self) -> float:
        """Predicted speed of decoding."""
        best = self.exact.rows[0]
        return best.tokens_per_second if self.lossy is None else self.lossy.tokens_per_second

    @property
    def caches(self) -> TwoCaches | None:
        """Caches of two forms; None: one of primary records, or frozen residents."""
        return None if self.lossy is None else self.lossy.caches

    @property
    def nats_per_token(self) -> float:
        """Expected divergence from the checkpoint, bits and answers together."""
        answers = 0.0 if self.lossy is None else self.lossy.replayed.nats_per_token
        return self.experts.nats + answers
