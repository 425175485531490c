"""Record of an expert in the codes of a quantized checkpoint: `NAME.codes`, `NAME.scale` and, where
the format has them, `NAME.global_scale` and `NAME.zero` of every matrix; a vector is one segment in
the checkpoint's floats."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from moe_tool.artifacts.moe_shape import ExpertTensor, MoeShape
from moe_tool.artifacts.precision import KeptPrecision
from moe_tool.errors import CorruptArtifactError
from moe_tool.formats.expert_form import fill_by_name
from moe_tool.formats.record_layout import REPACK, RecordLayout, lay_out
from moe_tool.quantization.kept_codes import SCALE_KINDS, KeptWeight
from moe_tool.quantization.weights import AnyWeight, ExpertWeights, FloatWeight

_STORED = {"e8m0": "uint8", "e4m3": "float8_e4m3fn"}
_ZEROS = {"codes": "uint8", "bias": "float32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptForm:
    """Experts in kept codes."""

    precision: KeptPrecision
    tensors: tuple[ExpertTensor, ...]
    layout: RecordLayout

    @classmethod
    def of(cls, shape: MoeShape, precision: KeptPrecision) -> "KeptForm":
        """Return the form of a model's experts.

        Raises:
            CorruptArtifactError: rows of 4-bit codes have an odd length.
        """
        parts: list[tuple[str, str, tuple[int, ...]]] = []
        for tensor in shape.expert_tensors:
            if len(tensor.shape) == 2:
                parts += _matrix_parts(tensor.name, *tensor.shape, precision)
            else:
                parts.append((tensor.name, shape.dtype, tensor.shape))
        return cls(precision=precision, tensors=shape.expert_tensors, layout=lay_out(parts))

    def encode(self, content: Mapping[str, AnyWeight]) -> torch.Tensor:
        """Return a record, uint8 [layout.size_bytes]."""
        return fill_by_name(self.layout, content)

    def decode(self, record: torch.Tensor) -> ExpertWeights:
        """Return an expert whose weights are views into `record`."""
        views = self.layout.views(record)
        weights = ExpertWeights()
        for tensor in self.tensors:
            name = tensor.name
            if len(tensor.shape) != 2:
                weights[name] = FloatWeight(values=views[name])
                continue
            weights[name] = KeptWeight(
                codes=views[f"{name}.codes"],
                kind=self.precision.codes,
                scale=views[f"{name}.scale"],
                group=_group(self.precision, tensor.shape[1]),
                global_scale=views.get(f"{name}.global_scale"),
                is_divisor=self.precision.global_scale == "divisor",
                zero=views.get(f"{name}.zero"),
            )
        return weights

    def require_finite(self, record: torch.Tensor) -> None:
        """Refuse scales, biases and codes that stand for NaN or infinity.

        Raises:
            CorruptArtifactError: names the segment.
        """
        for name, weight in self.decode(record).items():
            part = weight.broken_part() if isinstance(weight, KeptWeight) else None
            if part is not None:
                raise CorruptArtifactError(f"{name}.{part} holds NaN or infinity", hint=REPACK)


def kept_precision(expert: Mapping[str, AnyWeight]) -> KeptPrecision:
    """Return the precision of an expert whose matrices are kept codes.

    Raises:
        ValueError: its matrices differ in more than their shapes, or the kernels lack the format.
    """
    weights = [each for each in expert.values() if isinstance(each, KeptWeight)]
    whole = all(each.group[1] >= each.shape[1] for each in weights)
    found = {_precision_of(each, whole) for each in weights}
    if len(found) != 1:
        raise ValueError("the matrices of an expert are stored in different formats")
    return found.pop()


def with_equal_groups(
    expert: Mapping[str, FloatWeight | KeptWeight],
) -> dict[str, FloatWeight | KeptWeight]:
    """Return an expert whose matrices have groups of as many rows, repeating scales if need be."""
    rows = {each.group[0] for each in expert.values() if isinstance(each, KeptWeight)}
    if len(rows) == 1 and max(rows) < 2**16:
        return dict(expert)
    return {
        name: each.with_rows_alone() if isinstance(each, KeptWeight) else each
        for name, each in expert.items()
    }


def _precision_of(weight: KeptWeight, is_whole: bool) -> KeptPrecision:
    has_global, zero = weight.global_scale is not None, weight.zero
    kind = "none" if zero is None else "codes" if zero.dtype == torch.uint8 else "bias"
    return KeptPrecision.model_validate(
        {
            "codes": weight.kind,
            "group_rows": weight.group[0],
            "group_columns": 0 if is_whole else weight.group[1],
            "scale": SCALE_KINDS[weight.scale.dtype],
            "global_scale": ("divisor" if weight.is_divisor else "factor") * has_global or "none",
            "zero": kind,
        }
    )


def _group(precision: KeptPrecision, n_inputs: int) -> tuple[int, int]:
    return precision.group_rows, precision.group_columns or n_inputs


def _matrix_parts(
    name: str, n_outputs: int, n_inputs: int, precision: KeptPrecision
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    if n_inputs * precision.width_bits % 8:
        raise CorruptArtifactError(
            f"{name} has rows of {n_inputs} codes of {precision.width_bits} bits, which fill no "
            "whole bytes",
            hint=REPACK,
        )
    rows, columns = _group(precision, n_inputs)
    grid = (-(-n_outputs // rows), -(-n_inputs // columns))
    yield f"{name}.codes", "uint8", (n_outputs, n_inputs * precision.width_bits // 8)
    yield f"{name}.scale", _STORED.get(precision.scale, precision.scale), grid
    if precision.global_scale != "none":
        yield f"{name}.global_scale", "float32", (n_outputs,)
    if precision.zero != "none":
        yield f"{name}.zero", _ZEROS[precision.zero], grid
