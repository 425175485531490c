"""Plan for packing and running a model in a memory budget, with the predicted result."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from moe_tool.artifacts.identity import HexDigest, ModelIdentity
from moe_tool.artifacts.moe_shape import Count, Index
from moe_tool.artifacts.schema import FrozenModel

Bits = Annotated[str, Field(pattern=r"^(native|mixed|[12348]z?(:(32|64|128))?)$")]
"""Bits of the experts, as in `pack --bits`; mixed: set per expert"""
Quantizer = Annotated[str, Field(pattern=r"^[a-z0-9\-]{1,32}$")]
"""Quantizer as in `--quantizer`; its existence is checked when a file is read"""
SkeletonBits = Literal["native", "8", "4"]
SizeBytes = Annotated[int, Field(ge=0, le=2**60)]
Positive = Annotated[float, Field(ge=0, le=1e12)]
EvictionName = Annotated[str, Field(pattern=r"^[a-z0-9+:=,\-]{1,128}$")]
"""Eviction policy as in `--eviction`; its existence is checked when a file is read"""


class PlanLine(FrozenModel):
    """One entry of the memory account."""

    name: Annotated[str, Field(max_length=256)]
    size_bytes: SizeBytes


class LayerBits(FrozenModel):
    """Bits of each expert of a layer."""

    layer: Index
    bits: tuple[Literal[0, 1, 2, 3, 4, 8, 16, "2+1", "2+2"], ...]
    """[E] bits; 16: the checkpoint's dtype, 0: the expert is removed, 2+2: nested"""


class PlannedForm(FrozenModel):
    """One form, and the experts that are resident in it."""

    role: Literal["primary", "replica"]
    precision: Annotated[str, Field(pattern=r"^(native|rank\d{1,4}|\dz?(:\d{2,3})?)$")]
    """Name of the precision"""
    record_bytes: SizeBytes
    resident: tuple[tuple[Index, Index], ...]
    """Resident experts as (layer, expert), by descending value per byte"""
    n_disk_only: Annotated[int, Field(ge=0, le=2**32)]
    """Experts that have a record of this form but are not resident in it"""
    cached: Annotated[int, Field(ge=0, le=2**32)] = 0
    """Slots of a cache of this form, whose content varies; 0: only residents are in memory"""


class PlanPrediction(FrozenModel):
    """Predictions for a run, from the profile's held-out tokens."""

    tokens_per_second: Positive
    error: Annotated[float, Field(ge=0, le=10)]
    """Relative error of the predicted rate, as found on the models that it was tested on"""
    hit_rate: Annotated[float, Field(ge=0, le=1)]
    bytes_per_token: Positive
    to_belady: Positive | None
    """Misses over those of Belady's bound; None if the bound has none"""
    seconds_to_first_token: Positive
    prompt_tokens: Count
    """Prompt length behind `seconds_to_first_token`"""
    expert_slots: Count
    loss: Positive | None
    """Relative increase of perplexity from the profile's prices of these bits; None without
    prices"""
    kl: Positive | None = None
    """KL against the checkpoint in nats per token from the profile's prices, bits and lossy answers
    together; None if misses are answered exactly"""
    kl_of_bits: Positive = 0.0
    """Part of `kl` due to the experts' bits"""


class PackPlan(FrozenModel):
    """Artifact of `moe-tool plan`, followed by `pack --plan`, then by `run`."""

    kind: Literal["plan"] = "plan"
    format_version: Literal[2] = 2
    tool_version: str
    identity: ModelIdentity
    profile_sha256: HexDigest
    hardware: Annotated[str, Field(max_length=256)]
    """Name of the machine whose speeds were used"""
    memory_bytes: SizeBytes
    """Budget of the whole process"""
    context: Count
    """Positions that the budget has room for"""
    bits: Bits
    skeleton_bits: SkeletonBits
    expert_bits: Annotated[tuple[LayerBits, ...], Field(max_length=4096)] = ()
    """One entry per layer if `bits` is mixed"""
    quantizer: Quantizer = "rtn"
    """Quantizer behind the measured errors, for `pack` to use"""
    eviction: EvictionName
    prefetch: Literal["none", "next-layer"]
    replicas: Annotated[str, Field(pattern=r"^[a-z0-9:,]{0,200}$")] = ""
    """Cheaper forms to pack beside every expert, as in `pack --replicas`"""
    policy: Annotated[str, Field(pattern=r"^[a-z0-9:=,.+\-]{1,200}$")] | None = None
    """Miss policy as in `--policy`; None: every miss is fetched"""
    residency: Literal["cache"] | None = None
    """Residency under the policy as in `--residency`; None: the policy's own"""
    max_kl: Positive | None = None
    """Limit that the predicted KL keeps; None if misses are answered exactly"""
    forms: Annotated[tuple[PlannedForm, ...], Field(max_length=16)] = ()
    """Residents by form under a lossy policy, primary first. `run` decides again by the same rule,
    with the prices measured by `pack` and the memory available then"""
    robust: Annotated[float, Field(ge=0, le=1, exclude_if=lambda share: share == 0)] = 0.0
    """Share of the worst case over domains in the use that residents are chosen by, as in
    `--robust`; not written if it is 0"""
    prediction: PlanPrediction
    lines: Annotated[tuple[PlanLine, ...], Field(max_length=64)]
    """Memory account"""

    @model_validator(mode="after")
    def _has_bits(self) -> "PackPlan":
        if (self.bits == "mixed") != bool(self.expert_bits):
            raise ValueError("bits are mixed where every expert has its own, and only there")
        return self
