"""Run trace: the experts that each layer call of a run accessed, and the counters of the run."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field, model_validator

from moe_tool.artifacts.identity import ModelIdentity
from moe_tool.artifacts.moe_shape import Count, MoeShape
from moe_tool.artifacts.pack_plan import EvictionName
from moe_tool.artifacts.precision import Precision, WholeExpertPrecision
from moe_tool.artifacts.schema import FrozenModel
from moe_tool.budget.slots import min_slots

MAX_LAYERS = 512
"""MoE layers accepted from a file: four times those of the deepest models"""
_Seconds = Annotated[float, Field(ge=0, le=1e9)]
_Number = Annotated[int, Field(ge=0, le=2**50)]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedCalls:
    """C layer calls with A expert accesses.

    A key is an expert's number plus E times its layer's position among the MoE layers.
    """

    layer: np.ndarray
    """[C] int32: position of the layer among the MoE layers"""
    is_decode: np.ndarray
    """[C] bool: True for decode, False for prompts"""
    start: np.ndarray
    """[C + 1] int64: index in `keys` at which each call begins"""
    keys: np.ndarray
    """[A] int32 keys, ascending within a call"""
    guess_start: np.ndarray
    """[C + 1] int64: index in `guesses` at which each call begins"""
    guesses: np.ndarray
    """int32 keys predicted for later layers; empty if nothing needed predictions"""
    scores: np.ndarray | None
    """[C, E] uint16: quantized router scores; None if nothing needed scores"""


class RunTraceHeader(FrozenModel):
    """Options and counters of the recorded run."""

    identity: ModelIdentity
    shape: MoeShape
    precision: WholeExpertPrecision
    record_size_bytes: Count
    skeleton_precision: Precision
    matrix_bytes: _Number
    """Skeleton bytes that matrix products read in one forward"""
    n_matrices: _Number
    """Skeleton matrices, routers not counted"""
    threads: Annotated[int, Field(ge=1, le=4096)]
    n_slots: Count
    """Expert records in memory, pinned ones included"""
    pinned: tuple[tuple[int, int], ...]
    """(layer, expert) pairs that are never evicted"""
    eviction: EvictionName
    prefetch: Annotated[
        str,
        Field(
            pattern=r"^(none|next-layer|stacked(:depth=[1-8])?|partial(:alpha=[0-9.e\-]{1,24})?)$"
        ),
    ]
    n_calls_before: _Number
    """Warm-up calls at the beginning, which the counters leave out"""
    prompt_tokens: _Number
    decode_tokens: _Number
    decode_seconds: _Seconds
    hits: _Number
    misses: _Number
    prefetches: _Number
    prefetch_hits: _Number
    prompt_hits: _Number
    prompt_misses: _Number
    stall_seconds: _Seconds
    """Time that decoding waited for reads"""
    tool_version: str

    @model_validator(mode="after")
    def _consistent(self) -> "RunTraceHeader":
        n_layers, known = len(self.shape.layers), set(self.shape.layers)
        if n_layers > MAX_LAYERS:
            raise ValueError(f"{n_layers} layers are more than {MAX_LAYERS}")
        n_experts = n_layers * self.shape.experts
        if not min_slots(self.shape.top_k, n_experts) <= self.n_slots <= n_experts:
            raise ValueError(f"{n_experts} experts do not run in {self.n_slots} slots")
        if any(at not in known or not 0 <= e < self.shape.experts for at, e in self.pinned):
            raise ValueError("a pinned expert does not exist")
        n_pinned = len(self.pinned)
        if len(set(self.pinned)) != n_pinned:
            raise ValueError("an expert is pinned twice")
        n_left = self.n_slots - n_pinned
        if n_left < 1 and n_pinned != n_experts:
            raise ValueError(f"{n_pinned} pinned experts leave none of {self.n_slots} slots free")
        return self
