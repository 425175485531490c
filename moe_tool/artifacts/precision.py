"""Precisions of expert records: the checkpoint's floats or codes, integer codes with scales,
separately readable channels, or a low-rank map in the expert's place."""

import re
from typing import Annotated, ClassVar, Literal, Self, TypeVar

from pydantic import Field, model_validator

from moe_tool.artifacts.schema import FrozenModel

NATIVE_WIDTH = 16
"""Number of bits that stands for the checkpoint's dtype in a plan"""


class _Precision(FrozenModel):
    """Defaults of the properties that every precision has."""

    is_coded: ClassVar[bool] = False
    """Whether the matrices are integer codes that can be tuned"""

    @property
    def base(self) -> "IntegerPrecision | None":
        """Precision of the nested 2-bit base; None if not nested."""
        return None

    @property
    def leaves_noise(self) -> bool:
        """Whether the error of an answer is like noise, independent of the input."""
        return False

    def with_zeros(self, zeros: bool) -> Self:
        """Return the precision with or without zero points; itself if it cannot have any."""
        has_zeros = "zeros" in type(self).model_fields
        return self.model_copy(update={"zeros": zeros}) if has_zeros else self


class NativePrecision(_Precision):
    """The checkpoint's dtype, bit for bit."""

    kind: Literal["native"] = "native"
    name: ClassVar[str] = "native"
    """Name in `--bits`"""
    roles: ClassVar[frozenset[str]] = frozenset({"primary"})
    """Roles of tables that may have the precision"""
    order_key: ClassVar[tuple[int, int, int]] = (0, -NATIVE_WIDTH, 0)
    """Sort key, the most expensive precision first"""


class IntegerPrecision(_Precision):
    """Codes of `width_bits`, one float16 scale per `group` inputs of a row.

    The last group of a row may be short. Vectors (biases) stay in the checkpoint's dtype.
    """

    kind: Literal["integer"] = "integer"
    is_coded: ClassVar[bool] = True
    width_bits: Literal[8, 4, 3, 2, 1]
    group: Literal[32, 64, 128] = 64
    zeros: bool = False
    """Whether each scale has a float16 zero point; without, the grid is symmetric"""
    base_bits: Literal[2] | None = None
    """Leading bits of nested codes that, with scales of their own, form a complete expert at the
    start of the record; None if not nested"""
    of_bits: Literal[3, 4] | None = None
    """Width of the nested codes that this base is part of; None if not a base"""

    @property
    def name(self) -> str:
        """Name in `--bits` and `--replicas`: 4, 2:128 (groups of 128), 3z (zero points), 2+2
        (nested); 2of4 for the base of a nested one"""
        group = "" if self.group == 64 else f":{self.group}"
        if self.base_bits is not None:
            return f"{self.base_bits}+{self.width_bits - self.base_bits}{group}"
        of_bits = "" if self.of_bits is None else f"of{self.of_bits}"
        return f"{self.width_bits}{'z' if self.zeros else ''}{of_bits}{group}"

    @property
    def roles(self) -> frozenset[str]:
        if self.of_bits is not None:
            return frozenset({"base"})
        return frozenset({"primary"} if self.base_bits is not None else {"primary", "replica"})

    @property
    def order_key(self) -> tuple[int, int, int]:
        return (0, -self.width_bits, self.group)

    @property
    def base(self) -> "IntegerPrecision | None":
        if self.base_bits is None:
            return None
        return IntegerPrecision.model_validate(
            {"width_bits": self.base_bits, "group": self.group, "of_bits": self.width_bits}
        )

    @property
    def leaves_noise(self) -> bool:
        return self.width_bits > 1

    @model_validator(mode="after")
    def _consistent(self) -> "IntegerPrecision":
        is_nested, is_base = self.base_bits is not None, self.of_bits is not None
        if is_nested and (is_base or self.zeros or self.width_bits not in (3, 4)):
            raise ValueError("a nested precision has 3 or 4 bits, without zero points")
        if is_base and (self.zeros or self.width_bits != 2):
            raise ValueError("the first bits of a nested precision are 2, without zero points")
        return self


class KeptPrecision(_Precision):
    """A quantized checkpoint's codes, byte for byte, see quantization/kept_codes.py.

    Vectors (biases) stay floats.
    """

    kind: Literal["kept"] = "kept"
    codes: Literal["e2m1", "e4m3", "int4", "int8", "nf4"]
    group_rows: Annotated[int, Field(ge=1, le=2**16)]
    """Outputs that share a scale"""
    group_columns: Annotated[int, Field(ge=0, le=2**16)]
    """Inputs that share a scale: 16, 32, 64 or a multiple of 128; 0: all of a row"""
    scale: Literal["float32", "float16", "bfloat16", "e8m0", "e4m3"]
    global_scale: Literal["none", "factor", "divisor"] = "none"
    """Whether there is a float32 scale for each output too, and whether it divides the others"""
    zero: Literal["none", "codes", "bias"] = "none"
    """Zero points of integers: none, in units of codes, or float32 biases"""

    @property
    def name(self) -> str:
        """Name in tables: mxfp4, nvfp4, fp8, nf4, int8, or int4-g32 for groups of 32"""
        fixed = {("e2m1", "e8m0", 32): "mxfp4", ("e2m1", "e4m3", 16): "nvfp4"}
        name = fixed.get((self.codes, self.scale, self.group_columns))
        if name is not None:
            return name
        if self.codes == "e4m3":
            return "fp8"
        group = f"-g{self.group_columns}" if self.group_columns else ""
        zero = {"none": "", "codes": "-zeros", "bias": "-biases"}[self.zero]
        return f"{self.codes}{group}{zero}"

    @property
    def width_bits(self) -> int:
        """Bits of a code"""
        return 8 if self.codes in ("e4m3", "int8") else 4

    @property
    def roles(self) -> frozenset[str]:
        """Roles of tables that may have the precision"""
        return frozenset({"primary"})

    @property
    def order_key(self) -> tuple[int, int, int]:
        """Sort key, the most expensive precision first"""
        return (0, -self.width_bits, self.group_columns)

    @model_validator(mode="after")
    def _consistent(self) -> "KeptPrecision":
        if self.group_columns not in (16, 32, 64) and self.group_columns % 128:
            raise ValueError("a group has 16, 32, 64 or a multiple of 128 inputs, or all of a row")
        if self.zero != "none" and self.codes not in ("int4", "int8"):
            raise ValueError("only integers have zero points")
        return self


class LowRankPrecision(_Precision):
    """Low-rank linear map with an offset, fitted to the expert's output, in float16."""

    kind: Literal["low-rank"] = "low-rank"
    rank: Annotated[int, Field(ge=1, le=1024)]
    roles: ClassVar[frozenset[str]] = frozenset({"replica"})

    @property
    def name(self) -> str:
        """Name in `--replicas`: rank16"""
        return f"rank{self.rank}"

    @property
    def order_key(self) -> tuple[int, int, int]:
        return (1, -self.rank, 0)


class ChannelPrecision(_Precision):
    """Separately readable channels of a gated expert (FloE, arXiv:2505.05950).

    The selector (the up or the gate matrix) says which channels a token needs. The other matrix's
    row and the down matrix's column of a channel are stored side by side.
    """

    kind: Literal["channels"] = "channels"
    selected_by: Literal["up", "gate"]
    """Matrix that is the selector"""
    selector_bits: Literal[2, 3]
    """Width of the selector's codes"""
    width_bits: Literal[4, 8] = 4
    """Width of the channels' codes"""
    group: Literal[32, 64, 128] = 64
    """Numbers of a row, or of a column, that share a scale"""
    zeros: bool = False
    """Whether the selector has zero points; channels never have"""
    roles: ClassVar[frozenset[str]] = frozenset({"primary", "selector"})

    @property
    def name(self) -> str:
        """Name in `pack --sparse-experts`: up2:4, gate3:8:128"""
        group = "" if self.group == 64 else f":{self.group}"
        return f"{self.selected_by}{self.selector_bits}:{self.width_bits}{group}"

    @property
    def order_key(self) -> tuple[int, int, int]:
        return (0, -self.width_bits, self.group)

    @property
    def selector(self) -> IntegerPrecision:
        """Precision of the channel-selector matrix"""
        return IntegerPrecision(width_bits=self.selector_bits, group=self.group, zeros=self.zeros)

    @property
    def rows(self) -> IntegerPrecision:
        """Precision of the other matrix's rows, and of the down matrix's columns"""
        return IntegerPrecision(width_bits=self.width_bits, group=self.group)


_CHANNELS = re.compile(r"(up|gate)([23])(?::(4|8))?(?::(32|64|128))?")
_INTEGER = re.compile(r"(?:([12348])(z?)|2\+([12]))(?::(32|64|128))?")

Precision = Annotated[NativePrecision | IntegerPrecision, Field(discriminator="kind")]
WholeExpertPrecision = Annotated[
    NativePrecision | KeptPrecision | IntegerPrecision, Field(discriminator="kind")
]
ExpertPrecision = Annotated[
    NativePrecision | KeptPrecision | IntegerPrecision | ChannelPrecision,
    Field(discriminator="kind"),
]
_P = TypeVar("_P", bound=_Precision)
ReplicaPrecision = Annotated[IntegerPrecision | LowRankPrecision, Field(discriminator="kind")]
AnyPrecision = Annotated[
    NativePrecision | KeptPrecision | IntegerPrecision | ChannelPrecision | LowRankPrecision,
    Field(discriminator="kind"),
]


def stored_as(precision: _P, kept: KeptPrecision | None) -> _P | KeptPrecision:
    """Return the precision of records of a checkpoint whose codes are kept as `kept`, if any:
    native stands for it."""
    return kept if kept is not None and isinstance(precision, NativePrecision) else precision


def precision_from_bits(bits: str) -> NativePrecision | IntegerPrecision:
    """Return the precision that `--bits` names: native, 4, 2:128 (groups of 128 inputs), 3z (zero
    points), 2+2 (nested: 4 bits, of which the first 2 are a complete expert).

    Raises:
        ValueError: anything else.
    """
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
    """Return the precision that `pack --sparse-experts` names: up2 (selected by the up projection
    at 2 bits), gate3:8 (channels of 8 bits), up2:4:128 (groups of 128).

    Raises:
        ValueError: anything else.
    """
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
    """Return the precisions that `--replicas` names, the most expensive first: "3,2:128,rank16" is
    3 bits, 2 bits with groups of 128 inputs, and a map of rank 16.

    Raises:
        ValueError: anything else.
    """
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
