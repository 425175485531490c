"""What is to be planned for."""

from dataclasses import dataclass

from moe_tool.artifacts.pack_plan import Bits


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What is to be planned for."""

    memory: str
    bits: Bits | None = None
    """None: the fastest whose predicted loss is allowed"""
    skeleton_bits: Bits = "native"
    max_loss: float = 0.01
    """Perplexity that fewer bits may add, as a share"""
    context: int = 4096
