"""How an expert's numbers are written: the checkpoint's own floats, integer codes with scales, or a
low-rank map in its place."""

import re
from typing import Annotated, Literal

from pydantic import Field

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


class LowRankPrecision(FrozenModel):
    """Not the expert's weights but a linear map of low rank that was fitted to its output, with an
    offset: float16 throughout."""

    kind: Literal["low-rank"] = "low-rank"
    rank: Annotated[int, Field(ge=1, le=1024)]


_INTEGER = re.compile(r"([12348])(z?)(?::(32|64|128))?")

Precision = Annotated[NativePrecision | IntegerPrecision, Field(discriminator="kind")]
ReplicaPrecision = Annotated[IntegerPrecision | LowRankPrecision, Field(discriminator="kind")]


def precision_from_bits(bits: str) -> NativePrecision | IntegerPrecision:
    """Return the precision that `--bits` names: native, 4, 2:128 (groups of 128 inputs), 3z (zero
    points); a ValueError for anything else."""
    if bits == "native":
        return NativePrecision()
    found = _INTEGER.fullmatch(bits)
    if found is None:
        raise ValueError(bits)
    width, zeros, group = found.groups()
    return IntegerPrecision.model_validate(
        {"width_bits": int(width), "zeros": bool(zeros), "group": int(group or 64)}
    )


def bits_of(precision: NativePrecision | IntegerPrecision) -> str:
    """Return what `precision_from_bits` takes."""
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
        if not isinstance(integer, IntegerPrecision):
            raise ValueError(text)
        found.append(integer)
    if len(set(map(describe_precision, found))) < len(found):
        raise ValueError(text)
    integers = [each for each in found if isinstance(each, IntegerPrecision)]
    maps = [each for each in found if isinstance(each, LowRankPrecision)]
    integers.sort(key=lambda each: (-each.width_bits, each.group))
    maps.sort(key=lambda each: -each.rank)
    return (*integers, *maps)


def describe_precision(precision: NativePrecision | IntegerPrecision | LowRankPrecision) -> str:
    """Return a name for tables, as `--replicas` takes it: native, 4, 2:128, rank16."""
    if isinstance(precision, LowRankPrecision):
        return f"rank{precision.rank}"
    if isinstance(precision, NativePrecision):
        return "native"
    group = "" if precision.group == 64 else f":{precision.group}"
    return f"{precision.width_bits}{'z' if precision.zeros else ''}{group}"
