"""Error of every expert at every width, as measured with one quantizer."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from moe_tool.artifacts.identity import HexDigest, ModelIdentity
from moe_tool.artifacts.moe_shape import Index
from moe_tool.artifacts.pack_plan import Quantizer
from moe_tool.artifacts.schema import FrozenModel

Width = Literal[1, 2, 3, 4, 8]
Error = Annotated[float, Field(ge=0, le=1e6)]


class LayerBitPrices(FrozenModel):
    """One layer's errors."""

    layer: Index
    eps: Annotated[tuple[tuple[Error, ...], ...], Field(min_length=1, max_length=5)]
    """[widths][E]: relative error of the expert's output on held-out tokens"""
    kl_ratio: Annotated[float, Field(ge=0, le=1e6)]
    """Measured over predicted KL of the model with this layer alone at 2 bits; the prediction is
    its errors times the profile's sensitivity of the layer; 1 if not measured"""


class BitPrices(FrozenModel):
    """Artifact of `moe-tool plan --average-bits` with a quantizer that uses calibration inputs;
    kept beside the profile because it takes a pass over the model."""

    kind: Literal["bit-prices"] = "bit-prices"
    format_version: Literal[2] = 2
    tool_version: str
    identity: ModelIdentity
    profile_sha256: HexDigest
    quantizer: Quantizer
    widths: Annotated[tuple[Width, ...], Field(min_length=1, max_length=5)]
    """Ascending"""
    layers: Annotated[tuple[LayerBitPrices, ...], Field(max_length=4096)]

    @model_validator(mode="after")
    def _fits(self) -> "BitPrices":
        if list(self.widths) != sorted(set(self.widths)):
            raise ValueError("widths do not ascend")
        if any(len(entry.eps) != len(self.widths) for entry in self.layers):
            raise ValueError("a layer does not have one row of errors per width")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """One assignment of bits to experts."""

    name: str
    nats: float
    """Expected KL, nats per token"""
    experts: dict[int, int]
    """Width -> number of experts"""
    average_bits: float
    expert_bytes: int
