"""A plan with plain numbers."""

from typing import Any

from moe_tool.artifacts.pack_plan import PackPlan, PlanLine, PlanPrediction
from tests.formats import samples


def made_plan(**changed: Any) -> PackPlan:
    """Return it; any field can be another one."""
    fields: dict[str, Any] = {
        "tool_version": "0",
        "identity": samples.IDENTITY,
        "profile_sha256": "5" * 64,
        "hardware": "tiny",
        "memory_bytes": 2**30,
        "context": 64,
        "bits": "4",
        "skeleton_bits": "native",
        "eviction": "lru",
        "prefetch": "none",
        "prediction": PlanPrediction(
            tokens_per_second=2.0,
            error=0.15,
            hit_rate=0.5,
            bytes_per_token=100.0,
            to_belady=1.5,
            seconds_to_first_token=1.0,
            prompt_tokens=512,
            expert_slots=4,
            loss=0.001,
        ),
        "lines": (PlanLine(name="skeleton", size_bytes=5),),
    }
    return PackPlan(**(fields | changed))
