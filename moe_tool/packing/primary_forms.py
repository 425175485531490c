"""Primary precision of every expert: one for all, or as a plan says."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from moe_tool.artifacts.expert_ids import ExpertKey
from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.artifacts.pack_plan import PackPlan, Quantizer
from moe_tool.artifacts.precision import (
    NATIVE_WIDTH,
    ChannelPrecision,
    ExpertPrecision,
    KeptPrecision,
    Precision,
    precision_from_bits,
    stored_as,
)
from moe_tool.errors import CorruptArtifactError, UsageError
from moe_tool.formats.channel_form import has_channels
from moe_tool.packing.pack_options import PackOptions
from moe_tool.quantizers.registry import QUANTIZERS


@dataclass(frozen=True, slots=True, kw_only=True)
class PrimaryForms:
    """The primary precisions of a bundle's experts."""

    experts: Mapping[ExpertPrecision, frozenset[ExpertKey]]
    """Precision -> (layer, expert) of its experts"""
    removed: frozenset[ExpertKey] = frozenset()

    @property
    def is_nested(self) -> bool:
        """Whether some experts have nested bits."""
        return any(precision.base is not None for precision in self.experts)

    @property
    def has_codes(self) -> bool:
        """Whether any whole expert is quantized."""
        return any(precision.is_coded for precision in self.experts)


def primary_forms(
    options: PackOptions, shape: MoeShape, kept: KeptPrecision | None = None
) -> PrimaryForms:
    """Return the precisions of all experts.

    Args:
        options: options of `pack`.
        shape: shape of the model.
        kept: precision that native stands for, if the checkpoint has codes instead of floats.

    Raises:
        UsageError: bits are mixed without a plan, the quantizer cannot make them, or the experts
            have no channels.
        CorruptArtifactError: the plan's bits do not fit the model.
    """
    if options.channels is None and options.bits is None:
        planned = _as_planned(options.plan, shape, options.quantizer)
        return replace(planned, experts={stored_as(p, kept): e for p, e in planned.experts.items()})
    everyone = frozenset((layer, e) for layer in shape.layers for e in range(shape.experts))
    if options.channels is not None:
        return PrimaryForms(experts={_channels(options.channels, options, shape): everyone})
    assert options.bits is not None
    precision = stored_as(made_by(options.quantizer, options.bits), kept)
    return PrimaryForms(experts={precision: everyone})


def made_by(quantizer: Quantizer, precision: Precision) -> Precision:
    """Return the precision with a quantizer's zero points.

    Raises:
        UsageError: the quantizer does not support the precision.
    """
    spec = QUANTIZERS[quantizer]
    if precision.kind == "integer" and precision.zeros and not spec.makes_zeros:
        able = [each.name for each in QUANTIZERS.values() if each.makes_zeros]
        raise UsageError(
            f"--bits {precision.name}: only --quantizer {', '.join(able)} makes zero points",
            hint="leave out the z",
        )
    if precision.base is not None and not spec.can_nest:
        able = [each.name for each in QUANTIZERS.values() if each.can_nest]
        raise UsageError(
            f"--bits {precision.name}: nested bits need symmetric codes; {quantizer} uses zero "
            "points",
            hint=f"--quantizer {', '.join(able)}",
        )
    return precision.with_zeros(spec.makes_zeros)


def _as_planned(plan: PackPlan | None, shape: MoeShape, quantizer: Quantizer) -> PrimaryForms:
    if plan is None or plan.bits != "mixed":
        raise UsageError(
            "--bits mixed: the bits of each expert come from a plan",
            hint="--plan FILE, of moe-tool plan --average-bits",
        )
    entries = plan.expert_bits
    if [(e.layer, len(e.bits)) for e in entries] != [(x, shape.experts) for x in shape.layers]:
        raise CorruptArtifactError(
            f"the plan's bits are not those of {len(shape.layers)} layers of {shape.experts} "
            "experts",
            hint="plan again with moe-tool plan",
        )
    of_bits: dict[str, set[ExpertKey]] = {}
    for entry in entries:
        for expert, bits in enumerate(entry.bits):
            name = "native" if bits == NATIVE_WIDTH else str(bits)
            of_bits.setdefault(name, set()).add((entry.layer, expert))
    removed = frozenset(of_bits.pop("0", set()))
    if not of_bits:
        raise UsageError("the plan leaves every expert out", hint="plan with more --average-bits")
    return PrimaryForms(
        experts={
            made_by(quantizer, precision_from_bits(bits)): frozenset(keys)
            for bits, keys in of_bits.items()
        },
        removed=removed,
    )


def _channels(
    precision: ChannelPrecision, options: PackOptions, shape: MoeShape
) -> ChannelPrecision:
    if not has_channels(shape.expert_tensors):
        raise UsageError(
            f"--sparse-experts {precision.name}: the experts of {shape.model_type} have no joined "
            "gate and up projection, so no channels that a gate could close",
            hint="leave --sparse-experts out",
        )
    return precision.with_zeros(QUANTIZERS[options.quantizer].makes_zeros)
