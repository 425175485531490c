"""How a model is to be packed and run inside one memory budget, and what that is predicted to
give."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from moe_tool.artifacts.identity import HexDigest, ModelIdentity
from moe_tool.artifacts.moe_shape import Count, Index
from moe_tool.artifacts.schema import FrozenModel

PLAN_VERSION: Literal[2] = 2
Bits = Annotated[str, Field(pattern=r"^(native|mixed|[12348]z?(:(32|64|128))?)$")]
"""Bits of the experts, as `pack --bits` takes them; mixed: each has its own number"""
Quantizer = Annotated[str, Field(pattern=r"^[a-z0-9\-]{1,32}$")]
"""Name as `--quantizer` takes it; that there is such a quantizer is checked when a file is read"""
SkeletonBits = Literal["native", "8", "4"]
SizeBytes = Annotated[int, Field(ge=0, le=2**60)]
Positive = Annotated[float, Field(ge=0, le=1e12)]
EvictionName = Annotated[str, Field(pattern=r"^[a-z0-9+:=,\-]{1,128}$")]
"""Policy as `--eviction` takes it; that there is such a policy is checked when a file is read"""


class PlanLine(FrozenModel):
    """One entry of the memory account."""

    name: Annotated[str, Field(max_length=256)]
    size_bytes: SizeBytes


class LayerBits(FrozenModel):
    """How many bits each expert of a layer gets."""

    layer: Index
    bits: tuple[Literal[0, 1, 2, 3, 4, 8, 16, "2+1", "2+2"], ...]
    """[E]; 16: the checkpoint's dtype, 0: the expert is left out, 2+2: nested"""


class PlannedForm(FrozenModel):
    """One form of the experts, and of which experts it is in memory."""

    role: Literal["primary", "replica"]
    precision: Annotated[str, Field(pattern=r"^(native|rank\d{1,4}|\dz?(:\d{2,3})?)$")]
    """Name of the precision"""
    record_bytes: SizeBytes
    resident: tuple[tuple[Index, Index], ...]
    """(layer, expert), the most worth their bytes first"""
    n_disk_only: Annotated[int, Field(ge=0, le=2**32)]
    """Experts that have a record of this form and are not in memory in it; the others, beside
    those in memory, have none"""


class PlanPrediction(FrozenModel):
    """Predicted behaviour of a run, from the profile's held-out tokens."""

    tokens_per_second: Positive
    error: Annotated[float, Field(ge=0, le=10)]
    """Relative error that the prediction was found to have on the models that it was tried on"""
    hit_rate: Annotated[float, Field(ge=0, le=1)]
    bytes_per_token: Positive
    to_belady: Positive | None
    """Misses over those of the best possible order; None where that has none"""
    seconds_to_first_token: Positive
    prompt_tokens: Count
    """Length of the prompt that the time to the first token is for"""
    expert_slots: Count
    loss: Positive | None
    """Added perplexity as a share, by the profile's prices of these bits; None where it has none"""
    kl: Positive | None = None
    """Nats per token against the checkpoint, bits and lossy answers together, by the profile's
    prices; None where misses are answered exactly"""
    kl_of_bits: Positive = 0.0
    """Part of `kl` that the experts' bits cost by themselves"""


class PackPlan(FrozenModel):
    """The artifact of `moe-tool plan`: followed by `pack --plan`, then by `run`."""

    kind: Literal["plan"] = "plan"
    format_version: Literal[2] = PLAN_VERSION
    tool_version: str
    identity: ModelIdentity
    profile_sha256: HexDigest
    hardware: Annotated[str, Field(max_length=256)]
    """Name of the machine that the speeds are of"""
    memory_bytes: SizeBytes
    """Budget of the whole process"""
    context: Count
    """Positions that the budget has room for"""
    bits: Bits
    skeleton_bits: SkeletonBits
    expert_bits: Annotated[tuple[LayerBits, ...], Field(max_length=4096)] = ()
    """One entry per layer where `bits` is mixed"""
    quantizer: Quantizer = "rtn"
    """Quantizer that the errors were measured with, for `pack` to use"""
    eviction: EvictionName
    prefetch: Literal["none", "next-layer"]
    replicas: Annotated[str, Field(pattern=r"^[a-z0-9:,]{0,200}$")] = ""
    """Cheaper forms to be packed beside every expert, as `pack --replicas` takes them"""
    policy: Annotated[str, Field(pattern=r"^[a-z0-9:=,.+\-]{1,200}$")] | None = None
    """Policy that answers misses, as `--policy` takes it; None: every miss is read"""
    max_kl: Positive | None = None
    """Limit that the prediction keeps; None where misses are answered exactly"""
    forms: Annotated[tuple[PlannedForm, ...], Field(max_length=16)] = ()
    """Residents under a lossy policy by form, the primary one first. `run` decides again by the
    same rule, with the prices measured by `pack` and the memory that there is then"""
    prediction: PlanPrediction
    lines: Annotated[tuple[PlanLine, ...], Field(max_length=64)]
    """Memory account"""

    @model_validator(mode="after")
    def _has_bits(self) -> "PackPlan":
        if (self.bits == "mixed") != bool(self.expert_bits):
            raise ValueError("bits are mixed where every expert has its own, and only there")
        return self
