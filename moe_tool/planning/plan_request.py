"""What is to be planned for."""

from dataclasses import dataclass

from moe_tool.artifacts.pack_plan import Bits, SkeletonBits
from moe_tool.budget.request import EVERY_EXPERT, MemoryRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What is to be planned for."""

    memory: MemoryRequest = EVERY_EXPERT
    bits: Bits | None = None
    """None: the fastest whose predicted loss is allowed"""
    skeleton_bits: SkeletonBits = "native"
    max_loss: float = 0.01
    """Perplexity that fewer bits may add, as a share, where misses are answered exactly"""
    max_kl: float | None = None
    """Nats per token that bits and lossy answers may cost together; None: misses are answered
    exactly"""
    context: int = 4096
