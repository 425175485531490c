"""The forms in which a bundle holds an expert: as it is, or as a cheaper replica."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from moe_tool.artifacts.moe_shape import ExpertTensor, FloatName, MoeShape
from moe_tool.artifacts.precision import (
    ChannelPrecision,
    ExpertPrecision,
    IntegerPrecision,
    LowRankPrecision,
    NativePrecision,
    Precision,
    ReplicaPrecision,
    describe_precision,
)
from moe_tool.errors import CorruptArtifactError
from moe_tool.formats.channel_record import (
    channels_layout,
    chooser_layout,
    decode_channels,
    decode_chooser,
    has_channels,
    require_finite_scales,
)
from moe_tool.formats.expert_record import (
    QuantizeExpert,
    RecordLayout,
    decode_record,
    encode_record,
    nearest,
    record_layout,
    require_finite_segments,
)
from moe_tool.formats.integer_parts import is_factor
from moe_tool.quantization.low_rank import LOW_RANK_TENSORS
from moe_tool.quantization.weights import ExpertWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelForm:
    """How experts in channels are written: the channels, or what chooses them."""

    precision: ChannelPrecision
    shape: MoeShape
    layout: RecordLayout
    stem: str
    """Of the names of its files"""
    is_chooser: bool

    @property
    def name(self) -> str:
        """For tables: up2:4"""
        return describe_precision(self.precision)

    def decode(self, record: torch.Tensor) -> ExpertWeights:
        """Return an expert's channels as views into `record`; a chooser is no expert."""
        assert not self.is_chooser
        return decode_channels(self.layout, record, self.shape, self.precision)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertForm:
    """How the records of one level are written."""

    precision: Precision | LowRankPrecision
    tensors: tuple[ExpertTensor, ...]
    layout: RecordLayout
    stem: str
    """Of the names of its files"""

    @property
    def stored_precision(self) -> Precision:
        """Of the record's tensors: those of a low-rank map are floats as they are."""
        return NativePrecision() if isinstance(self.precision, LowRankPrecision) else self.precision

    @property
    def name(self) -> str:
        """For tables: native, 4, 2:128, rank16"""
        return describe_precision(self.precision)

    def encode(
        self,
        weights: Mapping[str, torch.Tensor],
        *,
        quantize_expert: QuantizeExpert = nearest,
    ) -> torch.Tensor:
        """Return a record, uint8 [layout.size_bytes]; see `encode_record`."""
        return encode_record(
            self.layout, weights, self.stored_precision, quantize_expert=quantize_expert
        )

    def decode(self, record: torch.Tensor) -> ExpertWeights:
        """Return an expert whose weights are views into `record`, uint8 [layout.size_bytes]."""
        return decode_record(self.layout, record, self.stored_precision, self.tensors)


AnyForm = ExpertForm | ChannelForm


def require_finite(form: AnyForm, record: torch.Tensor) -> None:
    """Refuse a record whose scales, thresholds or map hold NaN or infinity.

    Raises:
        CorruptArtifactError: names the segment.
    """
    if isinstance(form, ChannelForm):
        if form.is_chooser:
            require_finite_segments(
                form.layout, record, names=lambda name: is_factor(name) or name == "thresholds"
            )
            decode_chooser(form.layout, record, form.shape, form.precision)
        else:
            found = decode_channels(form.layout, record, form.shape, form.precision)
            require_finite_scales(found.channels)
        return
    is_map = isinstance(form.precision, LowRankPrecision)
    require_finite_segments(form.layout, record, names=lambda name: is_map or is_factor(name))


def full_form(shape: MoeShape, precision: Precision, *, is_other: bool = False) -> ExpertForm:
    """Return the form of the experts themselves.

    Args:
        shape: of the model.
        precision: of their matrices.
        is_other: most experts have another precision.
    """
    stem = f"experts-{_word(precision)}" if is_other else "experts"
    return _form(shape.expert_tensors, shape.dtype, precision, precision, stem)


def own_form(shape: MoeShape, precision: ExpertPrecision) -> AnyForm:
    """Return the form of most experts: `full_form`, or their channels.

    Raises:
        CorruptArtifactError: channels of a model whose experts have none.
    """
    if not isinstance(precision, ChannelPrecision):
        return full_form(shape, precision)
    _require_channels(shape)
    return ChannelForm(
        precision=precision,
        shape=shape,
        layout=channels_layout(shape, precision),
        stem="experts",
        is_chooser=False,
    )


def chooser_form(shape: MoeShape, precision: ChannelPrecision) -> ChannelForm:
    """Return the form of what chooses channels.

    Raises:
        CorruptArtifactError: the model's experts have no channels.
    """
    _require_channels(shape)
    return ChannelForm(
        precision=precision,
        shape=shape,
        layout=chooser_layout(shape, precision),
        stem="choosers",
        is_chooser=True,
    )


def _require_channels(shape: MoeShape) -> None:
    if not has_channels(shape.expert_tensors):
        raise CorruptArtifactError(
            "channels of experts that have no joined gate and up projection",
            hint="pack the bundle again with moe-tool pack",
        )


def replica_form(shape: MoeShape, precision: ReplicaPrecision) -> ExpertForm:
    """Return the form of a cheaper answer in an expert's place."""
    stem = f"replicas-{_word(precision)}"
    if isinstance(precision, IntegerPrecision):
        return _form(shape.expert_tensors, shape.dtype, precision, precision, stem)
    sizes = {"rank": precision.rank, "hidden": shape.hidden}
    tensors = tuple(
        ExpertTensor(name=name, shape=tuple(sizes[extent] for extent in extents))
        for name, extents in LOW_RANK_TENSORS.items()
    )
    return _form(tensors, "float16", NativePrecision(), precision, stem)


def _word(precision: Precision | LowRankPrecision) -> str:
    return describe_precision(precision).replace(":", "x")


def _form(
    tensors: tuple[ExpertTensor, ...],
    dtype: FloatName,
    stored: Precision,
    precision: Precision | LowRankPrecision,
    stem: str,
) -> ExpertForm:
    return ExpertForm(
        precision=precision,
        tensors=tensors,
        layout=record_layout(tensors, dtype, stored),
        stem=stem,
    )
