"""Predicted memory account of a run."""

from dataclasses import dataclass, replace

from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.artifacts.pack_plan import Bits, SkeletonBits
from moe_tool.artifacts.skeleton_facts import SkeletonFacts
from moe_tool.budget.account import MemoryPlan, plan_memory
from moe_tool.budget.refusal import MemoryLine, sum_lines
from moe_tool.budget.request import MemoryRequest
from moe_tool.budget.slots import ExpertRoom, min_slots
from moe_tool.errors import BudgetError
from moe_tool.formats.profile_hdf5 import ProfileHeader
from moe_tool.models.model_config import config_from_json
from moe_tool.planning.model_costs import record_size
from moe_tool.planning.plan_request import PlanRequest
from moe_tool.planning.plan_sources import PlanSources
from moe_tool.runtime.working_set import Workload, positions_within, run_lines

PROCESS_BYTES = 428 * 2**20
"""Size of a process with Python, torch and transformers after a first forward: 424 to 426 MiB by
verb; a run measures it"""


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedMemory:
    """Account of a run beside its experts."""

    lines: tuple[MemoryLine, ...]
    loading_bytes: int
    """Peak memory of loading the skeleton"""
    with_tables_on_disk: "FixedMemory | None" = None
    """Account of a run that leaves large embedding tables on disk; None without any"""

    @property
    def least(self) -> "FixedMemory":
        """The smaller account, of a run without room for everything."""
        return self.with_tables_on_disk or self

    @property
    def total_bytes(self) -> int:
        """Sum of the lines in bytes."""
        return sum_lines(self.lines)

    def within(self, memory: MemoryRequest, rooms: tuple[ExpertRoom, ...]) -> MemoryPlan:
        """Return the lines and expert slots of a budget other than auto.

        Tables stay on disk unless everything fits into memory, as in a run.

        Raises:
            BudgetError: it is too small; the hint names the smallest that works.
        """
        if self.with_tables_on_disk is not None:
            try:
                whole = self._within(memory, rooms)
            except BudgetError:
                return self.with_tables_on_disk._within(memory, rooms)
            if whole.n_slots < sum(room.n_experts for room in rooms):
                return self.with_tables_on_disk._within(memory, rooms)
            return whole
        return self._within(memory, rooms)

    def _within(self, memory: MemoryRequest, rooms: tuple[ExpertRoom, ...]) -> MemoryPlan:
        return plan_memory(
            memory,
            fixed=self.lines,
            loading_bytes=self.loading_bytes,
            experts=rooms,
            available_bytes=None,
        )


def fixed_memory(
    shape: MoeShape, skeleton: SkeletonFacts, *, skeleton_bits: SkeletonBits, context: int
) -> FixedMemory:
    """Return the memory of a run of one sequence of `context` positions beside its experts."""
    native = skeleton.held_bytes or skeleton.native_bytes + _widened_bytes(shape)
    held = native + skeleton.stored_bytes(skeleton_bits) - skeleton.native_bytes
    reading = skeleton.reading_bytes or skeleton.largest_tensor_bytes
    tables, on_disk = skeleton.tables_on_disk, None
    if tables is not None:
        rest = max(0, held - tables.held_bytes)
        on_disk = _account(shape, skeleton, rest, reading=tables.reading_bytes, context=context)
    whole = _account(shape, skeleton, held, reading=reading, context=context)
    return replace(whole, with_tables_on_disk=on_disk)


def _account(
    shape: MoeShape, skeleton: SkeletonFacts, held_bytes: int, *, reading: int, context: int
) -> FixedMemory:
    config = config_from_json(skeleton.config_json)
    positions = positions_within(config, context)
    return FixedMemory(
        lines=run_lines(
            config,
            shape,
            Workload(batch=1, positions=positions, prompt_tokens=positions),
            process_bytes=PROCESS_BYTES,
            skeleton_bytes=held_bytes,
            beside={},
        ),
        loading_bytes=PROCESS_BYTES + held_bytes + reading,
    )


def account_of_bits(
    memory: MemoryRequest, sources: PlanSources, request: PlanRequest, bits: Bits
) -> MemoryPlan:
    """Return the account of a budget with all experts at one precision, see `within`."""
    header = sources.profile.header
    fixed = fixed_memory(
        header.shape,
        sources.skeleton,
        skeleton_bits=request.skeleton_bits,
        context=request.context,
    )
    return fixed.within(memory, rooms_of_bits(header, bits))


def rooms_of_bits(header: ProfileHeader, bits: Bits) -> tuple[ExpertRoom, ...]:
    """Return the pool of all experts at one precision."""
    shape = header.shape
    n_experts = shape.experts * len(shape.layers)
    return (
        ExpertRoom(
            record_bytes=record_size(header, bits),
            n_experts=n_experts,
            n_slots_min=min_slots(shape.top_k, n_experts),
        ),
    )


def _widened_bytes(shape: MoeShape) -> int:
    """Return the growth of the routers, held as float32 in a run, for profiles that lack
    `held_bytes`; norms and biases are small."""
    return 2 * len(shape.layers) * shape.experts * shape.hidden
