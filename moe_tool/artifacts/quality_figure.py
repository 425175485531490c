"""Measured divergence, as stored in artifacts."""

from typing import Annotated

from pydantic import Field

from moe_tool.artifacts.form_table import Price
from moe_tool.artifacts.schema import FrozenModel


class QualityFigure(FrozenModel):
    """Measured KL with its 95 % interval, nats per token."""

    kl: Price
    kl_ci95: tuple[Price, Price]
    tokens: Annotated[int, Field(ge=1, le=2**40)]
