"""Which expert has which precision of its own: one for all, or each as a plan says."""

from collections import Counter
from dataclasses import dataclass

from moe_tool.artifacts.expert_ids import ExpertKey
from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.artifacts.pack_plan import PackPlan, Quantizer
from moe_tool.artifacts.precision import (
    ChannelPrecision,
    IntegerPrecision,
    NativePrecision,
    channel_precision,
    precision_from_bits,
)
from moe_tool.errors import CorruptArtifactError, UsageError
from moe_tool.formats.channel_record import has_channels
from moe_tool.quantizers.registry import QUANTIZERS

OwnPrecision = NativePrecision | IntegerPrecision
NATIVE_WIDTH = 16
"""What a plan calls the checkpoint's dtype, whatever it is"""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnForms:
    """The precisions of a bundle's experts."""

    precision: OwnPrecision | ChannelPrecision
    """Of most of them"""
    others: tuple[tuple[OwnPrecision, frozenset[ExpertKey]], ...] = ()
    """Of the rest; the most bits first"""
    absent: frozenset[ExpertKey] = frozenset()

    @property
    def is_nested(self) -> bool:
        """Whether the first bits of every expert are one too."""
        return isinstance(self.precision, IntegerPrecision) and self.precision.base is not None

    @property
    def has_codes(self) -> bool:
        """Whether anything is quantized."""
        every = (self.precision, *(precision for precision, _ in self.others))
        return any(isinstance(each, IntegerPrecision) for each in every)

    @property
    def is_sparse(self) -> bool:
        """Whether experts are in channels."""
        return isinstance(self.precision, ChannelPrecision)


def own_forms(
    option: str, bits: str, plan: PackPlan | None, shape: MoeShape, quantizer: Quantizer
) -> OwnForms:
    """Return the precisions of all experts.

    Args:
        option: its name, for a refusal.
        bits: as `pack --bits` takes it; mixed: as the plan says.
        plan: of the model; wanted where bits are mixed.
        shape: of the model.
        quantizer: hqq gives every scale a zero point.

    Raises:
        UsageError: the bits are not known, or mixed without a plan.
        CorruptArtifactError: the plan's bits do not fit the model.
    """
    if bits != "mixed":
        return OwnForms(precision=parse_precision(option, bits, quantizer))
    if plan is None or plan.bits != "mixed":
        raise UsageError(
            f"{option} mixed: which expert gets how many bits is what a plan says",
            hint="--plan FILE, of moe-tool plan --average-bits",
        )
    entries = plan.expert_bits
    if [(e.layer, len(e.bits)) for e in entries] != [(x, shape.experts) for x in shape.layers]:
        raise CorruptArtifactError(
            f"the plan's bits are not those of {len(shape.layers)} layers of {shape.experts} "
            "experts",
            hint="plan again with moe-tool plan",
        )
    of_width: dict[int, set[ExpertKey]] = {}
    for entry in entries:
        for expert, width in enumerate(entry.bits):
            of_width.setdefault(width, set()).add((entry.layer, expert))
    absent = frozenset(of_width.pop(0, set()))
    if not of_width:
        raise UsageError("the plan leaves every expert out", hint="plan with more --average-bits")
    counts = Counter({width: len(keys) for width, keys in of_width.items()})
    most = max(counts, key=lambda width: (counts[width], width))
    precisions = {
        width: parse_precision(option, "native" if width == NATIVE_WIDTH else str(width), quantizer)
        for width in of_width
    }
    return OwnForms(
        precision=precisions[most],
        others=tuple(
            (precisions[width], frozenset(of_width[width]))
            for width in sorted(of_width, reverse=True)
            if width != most
        ),
        absent=absent,
    )


def channel_forms(name: str, bits: str, shape: MoeShape, quantizer: Quantizer) -> OwnForms:
    """Return the precisions of experts in channels.

    Args:
        name: as `--sparse-experts` takes it.
        bits: as `--bits` takes it; native: not asked for.
        shape: of the model.
        quantizer: hqq gives the matrix that chooses zero points.

    Raises:
        UsageError: the name is not known, `--bits` says something too, or the experts have no
            channels.
    """
    try:
        found = channel_precision(name)
    except ValueError:
        raise UsageError(
            f"--sparse-experts {name} is not known",
            hint="use up2, up3, gate2 or gate3; gate2:8 has channels of 8 bits instead of 4",
        ) from None
    if bits != "native":
        raise UsageError(
            f"--bits {bits} beside --sparse-experts {name}: the latter has the bits of all parts",
            hint=f"--sparse-experts {found.chosen_by}{found.chooser_bits}:8",
        )
    if not has_channels(shape.expert_tensors):
        raise UsageError(
            f"--sparse-experts {name}: the experts of {shape.model_type} have no joined gate and "
            "up projection, so no channels that a gate could close",
            hint="leave --sparse-experts out",
        )
    return OwnForms(precision=found.model_copy(update={"zeros": QUANTIZERS[quantizer].makes_zeros}))


def parse_precision(option: str, bits: str, quantizer: Quantizer = "rtn") -> OwnPrecision:
    """Return the precision that an option names.

    Raises:
        UsageError: with those that there are.
    """
    try:
        found = precision_from_bits(bits)
    except ValueError:
        raise UsageError(
            f"{option} {bits} is not known", hint="use native, 8, 4, 3, 2, 1, 2:128 or 2+2"
        ) from None
    if isinstance(found, NativePrecision):
        return found
    spec = QUANTIZERS[quantizer]
    if found.zeros and not spec.makes_zeros:
        able = [each.name for each in QUANTIZERS.values() if each.makes_zeros]
        raise UsageError(
            f"{option} {bits}: only --quantizer {', '.join(able)} makes zero points",
            hint="leave out the z",
        )
    if found.base_bits is not None and not spec.can_nest:
        able = [each.name for each in QUANTIZERS.values() if each.can_nest]
        raise UsageError(
            f"{option} {bits}: nested bits need symmetric codes; {quantizer} uses zero points",
            hint=f"--quantizer {', '.join(able)}",
        )
    return found.model_copy(update={"zeros": QUANTIZERS[quantizer].makes_zeros})
