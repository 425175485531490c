"""Where the bytes of a run will go, before there is a run."""

from dataclasses import dataclass

from moe_tool.artifacts.moe_shape import FLOAT_SIZE_BYTES, MoeShape
from moe_tool.artifacts.pack_plan import Bits, SkeletonBits
from moe_tool.artifacts.skeleton_facts import SkeletonFacts
from moe_tool.models.context_length import context_length
from moe_tool.models.model_config import config_from_json
from moe_tool.planning.model_costs import record_size
from moe_tool.runtime.expert_room import ExpertRoom
from moe_tool.runtime.memory_plan import (
    MARGIN_BYTES,
    MemoryLine,
    MemoryPlan,
    parse_memory,
    plan_memory,
)
from moe_tool.runtime.working_set import Workload, buffer_bytes, kv_cache_bytes

PROCESS_BYTES = 424 * 2**20
"""Python, torch and transformers with a model of theirs run once; a run measures it instead"""
_NO_LIMIT_BYTES = 2**62


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedMemory:
    """What a run takes beside the experts."""

    lines: tuple[MemoryLine, ...]
    loading_bytes: int
    """The peak while the skeleton is loaded"""

    @property
    def total_bytes(self) -> int:
        """Of the lines."""
        return sum(line.size_bytes for line in self.lines)


def fixed_memory(
    shape: MoeShape, skeleton: SkeletonFacts, *, skeleton_bits: SkeletonBits, context: int
) -> FixedMemory:
    """Return what a run of one sequence takes beside its experts.

    Args:
        shape: of the model.
        skeleton: of the same model.
        skeleton_bits: of the matrices outside the experts.
        context: positions of the one sequence.
    """
    config = config_from_json(skeleton.config_json)
    positions = min(context, context_length(config) or context)
    workload = Workload(batch=1, positions=positions, prompt=positions)
    held = skeleton.stored_bytes(skeleton_bits) + _widened_bytes(shape)
    lines = (
        MemoryLine(name="process and its libraries", size_bytes=PROCESS_BYTES),
        MemoryLine(name="skeleton", size_bytes=held),
        MemoryLine(
            name=f"KV cache, {positions} positions x 1", size_bytes=kv_cache_bytes(config, workload)
        ),
        MemoryLine(name="working buffers", size_bytes=buffer_bytes(config, shape, workload)),
        MemoryLine(name="margin", size_bytes=MARGIN_BYTES),
    )
    return FixedMemory(
        lines=lines, loading_bytes=PROCESS_BYTES + held + skeleton.largest_tensor_bytes
    )


def account(
    memory: str,
    shape: MoeShape,
    skeleton: SkeletonFacts,
    *,
    bits: Bits,
    skeleton_bits: SkeletonBits,
    context: int,
) -> MemoryPlan:
    """Return the lines and expert slots of a budget.

    Args:
        memory: "8GiB", "50%" of the experts or "min".
        shape: of the model.
        skeleton: of the same model.
        bits: of the experts.
        skeleton_bits: of the other matrices.
        context: positions of the one sequence.

    Raises:
        UsageError: the text is no budget.
        BudgetError: it is too small: with the least that works.
    """
    fixed = fixed_memory(shape, skeleton, skeleton_bits=skeleton_bits, context=context)
    n_experts = shape.experts * len(shape.layers)
    return plan_memory(
        parse_memory(memory),
        fixed=fixed.lines,
        loading_bytes=fixed.loading_bytes,
        experts=(
            ExpertRoom(
                record_bytes=record_size(shape, bits),
                n_experts=n_experts,
                n_slots_min=min(shape.top_k + 1, n_experts),
            ),
        ),
        available_bytes=_NO_LIMIT_BYTES,
    )


def _widened_bytes(shape: MoeShape) -> int:
    """Routers are held as float32 whatever the checkpoint has; norms and biases are small."""
    wider = 4 - FLOAT_SIZE_BYTES[shape.dtype]
    return wider * len(shape.layers) * shape.experts * shape.hidden
