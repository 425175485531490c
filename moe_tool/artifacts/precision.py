"""How an expert's numbers are written: the checkpoint's own floats, or integer codes with
scales."""

from typing import Annotated, Literal

from pydantic import Field

from moe_tool.artifacts.schema import FrozenModel


class NativePrecision(FrozenModel):
    """The checkpoint's dtype, bit for bit."""

    kind: Literal["native"] = "native"


class IntegerPrecision(FrozenModel):
    """Symmetric round-to-nearest codes of `width_bits`, one float16 scale per `group` inputs of a
    row.

    The last group of a row may be short. Vectors (biases) stay in the checkpoint's dtype.
    """

    kind: Literal["integer"] = "integer"
    width_bits: Literal[8, 4]
    group: Literal[64] = 64


Precision = Annotated[NativePrecision | IntegerPrecision, Field(discriminator="kind")]


def precision_from_bits(bits: str) -> NativePrecision | IntegerPrecision:
    """Return the precision that `--bits native|8|4` names; a ValueError for anything else."""
    if bits == "native":
        return NativePrecision()
    if bits in ("8", "4"):
        return IntegerPrecision(width_bits=8 if bits == "8" else 4)
    raise ValueError(bits)


def bits_of(precision: NativePrecision | IntegerPrecision) -> str:
    """Return what `precision_from_bits` takes: native, 8 or 4."""
    return str(precision.width_bits) if isinstance(precision, IntegerPrecision) else "native"
