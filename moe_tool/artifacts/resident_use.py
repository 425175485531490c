"""Use of experts that residents are chosen by, where it is not the profile's mean."""

from typing import Annotated

from pydantic import Field, model_validator

from moe_tool.artifacts.form_table import Price
from moe_tool.artifacts.moe_shape import Index
from moe_tool.artifacts.schema import FrozenModel


class LayerUse(FrozenModel):
    """Use of one layer's experts."""

    layer: Index
    squared_gate: tuple[Price, ...]
    """[E]: squared gate weight per token"""
    load: tuple[Annotated[float, Field(ge=0, le=1)], ...]
    """[E]: share of tokens that want each expert"""

    @model_validator(mode="after")
    def _consistent(self) -> "LayerUse":
        if len(self.squared_gate) != len(self.load):
            raise ValueError("a layer has more experts in one list than in the other")
        return self


class ResidentUse(FrozenModel):
    """Section `resident-use`: use between the profile's mean and its worst domain. Residents are
    chosen by it; prices are those of the mean."""

    share: Annotated[float, Field(gt=0, le=1)]
    """Share of the worst case, as in `--robust`"""
    layers: Annotated[tuple[LayerUse, ...], Field(min_length=1, max_length=4096)]
