"""How an expert's numbers are written: the checkpoint's own floats, integer codes with scales,
channels that can be read alone, or a low-rank map in the expert's place."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from moe_tool.artifacts.schema import FrozenModel

NATIVE_WIDTH = 16
"""Number that stands for the checkpoint's dtype in a plan"""


class _Precision(FrozenModel):
    """Defaults of the questions that every precision answers."""

    @property
    def base(self) -> "IntegerPrecision | None":
        """Precision of the 2-bit expert that the first bits of a nested one are; None if not
        nested."""
        return None

    @property
    def is_coded(self) -> bool:
        """Whether the matrices of an expert are integer codes that can be tuned."""
        return False

    @property
    def leaves_noise(self) -> bool:
        """Whether the error of an answer is spread as noise is, independent of the input."""
        return False

    def with_zeros(self, zeros: bool) -> Self:
        """Return the precision with or without zero points; itself where there can be none."""
        return self


class NativePrecision(_Precision):
    """The checkpoint's dtype, bit for bit."""

    kind: Literal["native"] = "native"

    @property
    def name(self) -> str:
        """Name as `--bits` takes it"""
        return "native"

    @property
    def roles(self) -> frozenset[str]:
        """Roles of tables that may have the precision"""
        return frozenset({"primary"})

    @property
    def order_key(self) -> tuple[int, int, int]:
        """Sorts precisions, the dearest first"""
        return (0, -NATIVE_WIDTH, 0)


class IntegerPrecision(_Precision):
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
    """Width of the codes whose first bits these are; None: the codes are whole"""

    @property
    def name(self) -> str:
        """Name as `--bits` and `--replicas` take it: 4, 2:128 (groups of 128), 3z (zero points),
        2+2 (nested); 2of4: the first bits of a nested one"""
        group = "" if self.group == 64 else f":{self.group}"
        if self.base_bits is not None:
            return f"{self.base_bits}+{self.width_bits - self.base_bits}{group}"
        of_bits = "" if self.of_bits is None else f"of{self.of_bits}"
        return f"{self.width_bits}{'z' if self.zeros else ''}{of_bits}{group}"

    @property
    def roles(self) -> frozenset[str]:
        """Roles of tables that may have the precision"""
        if self.of_bits is not None:
            return frozenset({"base"})
        return frozenset({"primary"} if self.base_bits is not None else {"primary", "replica"})

    @property
    def order_key(self) -> tuple[int, int, int]:
        """Sorts precisions, the dearest first"""
        return (0, -self.width_bits, self.group)

    @property
    def base(self) -> "IntegerPrecision | None":
        """Precision of the 2-bit expert that the first bits of a nested one are; None if not
        nested."""
        if self.base_bits is None:
            return None
        return IntegerPrecision.model_validate(
            {"width_bits": self.base_bits, "group": self.group, "of_bits": self.width_bits}
        )

    @property
    def is_coded(self) -> bool:
        """Whether the matrices of an expert are integer codes that can be tuned."""
        return True

    @property
    def leaves_noise(self) -> bool:
        """Whether the error of an answer is spread as noise is, independent of the input."""
        return self.width_bits > 1

    def with_zeros(self, zeros: bool) -> Self:
        """Return the precision with or without zero points."""
        return self.model_copy(update={"zeros": zeros})

    @model_validator(mode="after")
    def _consistent(self) -> "IntegerPrecision":
        is_nested, is_base = self.base_bits is not None, self.of_bits is not None
        if is_nested and (is_base or self.zeros or self.width_bits not in (3, 4)):
            raise ValueError("a nested precision has 3 or 4 bits, without zero points")
        if is_base and (self.zeros or self.width_bits != 2):
            raise ValueError("the first bits of a nested precision are 2, without zero points")
        return self


class LowRankPrecision(_Precision):
    """Linear map of low rank that was fitted to an expert's output, with an offset, in the place of
    its weights: float16 throughout."""

    kind: Literal["low-rank"] = "low-rank"
    rank: Annotated[int, Field(ge=1, le=1024)]

    @property
    def name(self) -> str:
        """Name as `--replicas` takes it: rank16"""
        return f"rank{self.rank}"

    @property
    def roles(self) -> frozenset[str]:
        """Roles of tables that may have the precision"""
        return frozenset({"replica"})

    @property
    def order_key(self) -> tuple[int, int, int]:
        """Sorts precisions, the dearest first"""
        return (1, -self.rank, 0)


class ChannelPrecision(_Precision):
    """Channels of a gated expert that can be used alone: one of its first two matrices, the
    selector, says which of them a token needs, and of each channel the other matrix's row and the
    last one's column lie beside each other (FloE, arXiv:2505.05950)."""

    kind: Literal["channels"] = "channels"
    selected_by: Literal["up", "gate"]
    """The matrix that selects"""
    selector_bits: Literal[2, 3]
    """Width of the selector's codes"""
    width_bits: Literal[4, 8] = 4
    """Width of the channels' codes"""
    group: Literal[32, 64, 128] = 64
    """Numbers of a row, or of a column, that share a scale"""
    zeros: bool = False
    """The selector has zero points; channels never have"""

    @property
    def name(self) -> str:
        """Name as `--sparse-experts` takes it: up2:4, gate3:8:128"""
        group = "" if self.group == 64 else f":{self.group}"
        return f"{self.selected_by}{self.selector_bits}:{self.width_bits}{group}"

    @property
    def roles(self) -> frozenset[str]:
        """Roles of tables that may have the precision"""
        return frozenset({"primary", "selector"})

    @property
    def order_key(self) -> tuple[int, int, int]:
        """Sorts precisions, the dearest first"""
        return (0, -self.width_bits, self.group)

    @property
    def selector(self) -> IntegerPrecision:
        """Precision of the channel-selector matrix"""
        return IntegerPrecision(width_bits=self.selector_bits, group=self.group, zeros=self.zeros)

    @property
    def rows(self) -> IntegerPrecision:
        """Precision of the other matrix's rows, and of the last one's columns as rows"""
        return IntegerPrecision(width_bits=self.width_bits, group=self.group)

    def with_zeros(self, zeros: bool) -> Self:
        """Return the precision whose selector is with or without zero points."""
        return self.model_copy(update={"zeros": zeros})


_CHANNELS = re.compile(r"(up|gate)([23])(?::(4|8))?(?::(32|64|128))?")
_INTEGER = re.compile(r"(?:([12348])(z?)|2\+([12]))(?::(32|64|128))?")

Precision = Annotated[NativePrecision | IntegerPrecision, Field(discriminator="kind")]
ExpertPrecision = Annotated[
    NativePrecision | IntegerPrecision | ChannelPrecision, Field(discriminator="kind")
]
ReplicaPrecision = Annotated[IntegerPrecision | LowRankPrecision, Field(discriminator="kind")]
AnyPrecision = Annotated[
    NativePrecision | IntegerPrecision | ChannelPrecision | LowRankPrecision,
    Field(discriminator="kind"),
]


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
    """Return the precision that `--sparse-experts` of `pack` names: up2 (selected by the up
    projection at 2 bits), gate3:8 (channels of 8 bits), up2:4:128 (groups of 128); a ValueError for
    anything else."""
    found = _CHANNELS.fullmatch(text)
    if found is None:
        raise ValueError(text)
    selected_by, selector_bits, width_bits, group = found.groups()
    return ChannelPrecision.model_validate(
        {
            "selected_by": selected_by,
            "selector_bits": int(selector_bits),
            "width_bits": int(width_bits or 4),
            "group": int(group or 64),
        }
    )


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
        if integer.kind != "integer" or integer.base_bits is not None:
            raise ValueError(text)
        found.append(integer)
    if len({each.name for each in found}) < len(found):
        raise ValueError(text)
    return tuple(sorted(found, key=lambda each: each.order_key))
