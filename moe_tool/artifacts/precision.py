"""How an expert's numbers are written: the checkpoint's own floats, integer codes with scales, or a
low-rank map in its place."""

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from moe_tool.artifacts.schema import FrozenModel


class NativePrecision(FrozenModel):
    """The checkpoint's dtype, bit for bit."""

    kind: Literal["native"] = "native"


class IntegerPrecision(FrozenModel):
    """Codes of `width_bits`, one float16 scale per `group` inputs of a row.

    The last group of a row may be short. Vectors (biases) stay in the checkpoint's dtype.
    """

    kind: Literal["integer"] = "integer"
    width_bits: Literal[8, 4, 3, 2, 1]
    group: Literal[32, 64, 128] = 64
    zeros: bool = False
    """Each scale has a float16 zero point beside it; without, the grid is symmetric"""
    base_bits: Literal[2] | None = None
    """Nested: the first so many bits of the codes, with scales of their own, are an expert by
    themselves, and lie before everything else; None: they are not"""
    of_bits: Literal[3, 4] | None = None
    """These are such first bits, of codes of so many; None: the codes are whole"""

    @property
    def base(self) -> "IntegerPrecision | None":
        """Of the expert that a nested one's first bits are."""
        if self.base_bits is None:
            return None
        return IntegerPrecision.model_validate(
            {"width_bits": self.base_bits, "group": self.group, "of_bits": self.width_bits}
        )

    @model_validator(mode="after")
    def _consistent(self) -> "IntegerPrecision":
        is_nested, is_base = self.base_bits is not None, self.of_bits is not None
        if is_nested and (is_base or self.zeros or self.width_bits not in (3, 4)):
            raise ValueError("a nested precision has 3 or 4 bits, without zero points")
        if is_base and (self.zeros or self.width_bits != 2):
            raise ValueError("the first bits of a nested precision are 2, without zero points")
        return self


class LowRankPrecision(FrozenModel):
    """Not the expert's weights but a linear map of low rank that was fitted to its output, with an
    offset: float16 throughout."""

    kind: Literal["low-rank"] = "low-rank"
    rank: Annotated[int, Field(ge=1, le=1024)]


class ChannelPrecision(FrozenModel):
    """Channels of a gated expert that can be used alone: one of its first two matrices says which
    of them a token needs, and of each channel the other matrix's row and the last one's column lie
    beside each other (FloE, arXiv:2505.05950)."""

    kind: Literal["channels"] = "channels"
    chosen_by: Literal["up", "gate"]
    """The matrix that says so"""
    chooser_bits: Literal[2, 3]
    """Of that matrix"""
    width_bits: Literal[4, 8] = 4
    """Of the channels"""
    group: Literal[32, 64, 128] = 64
    """Numbers of a row, or of a column, that share a scale"""
    zeros: bool = False
    """The chooser has zero points; channels never have"""

    @property
    def chooser(self) -> IntegerPrecision:
        """Of the matrix that chooses."""
        return IntegerPrecision(width_bits=self.chooser_bits, group=self.group, zeros=self.zeros)

    @property
    def rows(self) -> IntegerPrecision:
        """Of the other matrix's rows, and of the last one's columns as rows."""
        return IntegerPrecision(width_bits=self.width_bits, group=self.group)


_CHANNELS = re.compile(r"(up|gate)([23])(?::(4|8))?(?::(32|64|128))?")
_INTEGER = re.compile(r"(?:([12348])(z?)|2\+([12]))(?::(32|64|128))?")

Precision = Annotated[NativePrecision | IntegerPrecision, Field(discriminator="kind")]
ExpertPrecision = Annotated[
    NativePrecision | IntegerPrecision | ChannelPrecision, Field(discriminator="kind")
]
ReplicaPrecision = Annotated[IntegerPrecision | LowRankPrecision, Field(discriminator="kind")]


def precision_from_bits(bits: str) -> NativePrecision | IntegerPrecision:
    """Return the precision that `--bits` names: native, 4, 2:128 (groups of 128 inputs), 3z (zero
    points), 2+2 (nested: 4 bits, of which the first 2 are an expert too); a ValueError for anything
    else."""
    if bits == "native":
        return NativePrecision()
    found = _INTEGER.fullmatch(bits)
    if found is None:
        raise ValueError(bits)
    width, zeros, more, group = found.groups()
    return IntegerPrecision.model_validate(
        {
            "width_bits": int(width) if more is None else 2 + int(more),
            "zeros": bool(zeros),
            "group": int(group or 64),
            "base_bits": None if more is None else 2,
        }
    )


def channel_precision(text: str) -> ChannelPrecision:
    """Return the precision that `--sparse-experts` of `pack` names: up2 (chosen by the up
    projection at 2 bits), gate3:8 (channels of 8 bits), up2:4:128 (groups of 128); a ValueError for
    anything else."""
    found = _CHANNELS.fullmatch(text)
    if found is None:
        raise ValueError(text)
    chosen_by, chooser_bits, width_bits, group = found.groups()
    return ChannelPrecision.model_validate(
        {
            "chosen_by": chosen_by,
            "chooser_bits": int(chooser_bits),
            "width_bits": int(width_bits or 4),
            "group": int(group or 64),
        }
    )


def bits_of(precision: NativePrecision | IntegerPrecision | ChannelPrecision) -> str:
    """Return what `precision_from_bits` or `channel_precision` takes."""
    return describe_precision(precision)


def replica_precisions(text: str) -> tuple[IntegerPrecision | LowRankPrecision, ...]:
    """Return what `--replicas` names, the dearest first: "3,2:128,rank16" is 3 bits, 2 bits with
    groups of 128 inputs, and a map of rank 16; a ValueError for anything else."""
    found: list[IntegerPrecision | LowRankPrecision] = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        rank = word.removeprefix("rank")
        if rank != word:
            found.append(LowRankPrecision.model_validate({"rank": int(rank)}))
            continue
        integer = precision_from_bits(word)
        if not isinstance(integer, IntegerPrecision) or integer.base_bits is not None:
            raise ValueError(text)
        found.append(integer)
    if len(set(map(describe_precision, found))) < len(found):
        raise ValueError(text)
    integers = [each for each in found if isinstance(each, IntegerPrecision)]
    maps = [each for each in found if isinstance(each, LowRankPrecision)]
    integers.sort(key=lambda each: (-each.width_bits, each.group))
    maps.sort(key=lambda each: -each.rank)
    return (*integers, *maps)


def describe_precision(
    precision: NativePrecision | IntegerPrecision | LowRankPrecision | ChannelPrecision,
) -> str:
    """Return a name for tables, as `--bits`, `--replicas` and `--sparse-experts` take it: native,
    4, 2:128, 2+2, rank16, up2:4; the first bits of a nested precision are called as if they were
    whole."""
    if isinstance(precision, LowRankPrecision):
        return f"rank{precision.rank}"
    if isinstance(precision, NativePrecision):
        return "native"
    group = "" if precision.group == 64 else f":{precision.group}"
    if isinstance(precision, ChannelPrecision):
        return f"{precision.chosen_by}{precision.chooser_bits}:{precision.width_bits}{group}"
    if precision.base_bits is not None:
        return f"{precision.base_bits}+{precision.width_bits - precision.base_bits}{group}"
    return f"{precision.width_bits}{'z' if precision.zeros else ''}{group}"
