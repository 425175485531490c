"""compressed-tensors: integers, FP8, NVFP4 and MXFP4, each module by the settings of its group."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_tool.formats.safetensors_index import TensorInfo
from moe_tool.models.stored_formats.fp8 import block_size, fp8_tensor
from moe_tool.models.stored_formats.integer_codes import IntegerParts, integer_tensor
from moe_tool.models.stored_formats.mxfp4 import mxfp4_matrix
from moe_tool.models.stored_formats.name_pattern import NamePattern
from moe_tool.models.stored_formats.nvfp4 import nvfp4_matrix
from moe_tool.models.stored_formats.stored_tensor import (
    StoredTensor,
    refused,
    require_part,
    unread_setting,
)

_NAME = "compressed-tensors"
_SCALE, _CODES = ".weight_scale", ".weight_packed"
_LINEAR = "Linear"
_PATTERN = "re:"
_PACKED = frozenset({"pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized"})
_PLAIN = frozenset({"float-quantized", "int-quantized", "naive-quantized"})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Settings of the modules that a group's targets name."""

    names: frozenset[str]
    patterns: tuple[NamePattern, ...]
    form: str
    is_float: bool
    width_bits: int
    is_symmetric: bool
    block: tuple[int, int] | None
    """Rows and columns with one scale; None: a channel, or all"""


def stored_tensors(
    raw: Mapping[str, TensorInfo], settings: Mapping[str, Any]
) -> dict[str, StoredTensor]:
    """Return the weights that have a scale, each read by the settings of its group.

    Raises:
        UnsupportedModelError: the settings are not built.
        CorruptArtifactError: codes and scales do not fit together, or a module has no group.
    """
    if settings.get("transform_config"):
        raise unread_setting(_NAME, "transform_config", settings["transform_config"])
    groups = _groups(settings)
    found = {}
    for name in raw:
        if name.endswith(_SCALE):
            module = name.removesuffix(_SCALE)
            group = _group_of(groups, module)
            if group is None:
                raise refused(raw[name], "belongs to no group of quantization_config")
            found[f"{module}.weight"] = _tensor(raw, module, group)
        elif name.endswith(_CODES):
            require_part(raw, name.removesuffix(_CODES) + _SCALE, of=name)
    return found


def _tensor(raw: Mapping[str, TensorInfo], module: str, group: _Group) -> StoredTensor:
    scale = raw[module + _SCALE]

    def part(role: str) -> TensorInfo:
        return require_part(raw, f"{module}.{role}", of=scale.name)

    codes = part("weight_packed" if group.form in _PACKED else "weight")
    if group.form == "nvfp4-pack-quantized":
        return nvfp4_matrix(codes, scale, part("weight_global_scale"), is_divisor=True)
    if group.form == "mxfp4-pack-quantized":
        return mxfp4_matrix(codes, scale)
    if group.is_float:
        return fp8_tensor(codes, scale, group.block)
    parts = IntegerParts(
        codes=codes,
        scale=scale,
        zero=None if group.is_symmetric else part("weight_zero_point"),
        order=raw.get(f"{module}.weight_g_idx"),
        width_bits=group.width_bits,
        is_packed=group.form in _PACKED,
    )
    return integer_tensor(parts, group.block)


def _group_of(groups: list[_Group], module: str) -> _Group | None:
    """Return the group that names a module; names go before patterns, those before classes."""
    for group in groups:
        if module in group.names:
            return group
    for group in groups:
        if any(pattern.matches(module) for pattern in group.patterns):
            return group
    return next((group for group in groups if _LINEAR in group.names), None)


def _groups(settings: Mapping[str, Any]) -> list[_Group]:
    found = settings.get("config_groups")
    if not isinstance(found, dict):
        raise unread_setting(_NAME, "config_groups", found)
    return [_group(settings, group) for group in found.values()]


def _group(settings: Mapping[str, Any], group: object) -> _Group:
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        raise unread_setting(_NAME, "config_groups", group)
    weights = group["weights"]
    form = str(group.get("format") or settings.get("format"))
    kind, width = weights.get("type", "int"), weights.get("num_bits", 8)
    if form not in _PACKED | _PLAIN or kind not in ("int", "float"):
        raise unread_setting(_NAME, "format", f"{form} of {kind}s")
    is_four = form in ("nvfp4-pack-quantized", "mxfp4-pack-quantized")
    fits = {
        "pack-quantized": kind == "int" and width in (2, 4, 8),
        "float-quantized": kind == "float" and width == 8,
        "int-quantized": kind == "int" and width == 8,
        "naive-quantized": width == 8,
    }
    fits_form = kind == "float" and width == 4 if is_four else fits[form]
    if not fits_form or type(width) is not int:
        raise unread_setting(_NAME, "num_bits", f"{width} of {form}")
    targets = group.get("targets")
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise unread_setting(_NAME, "targets", targets)
    return _Group(
        names=frozenset(t for t in targets if not t.startswith(_PATTERN)),
        patterns=tuple(_pattern(t) for t in targets if t.startswith(_PATTERN)),
        form=form,
        is_float=kind == "float",
        width_bits=width,
        is_symmetric=weights.get("symmetric", True) is not False,
        block=_block(weights),
    )


def _pattern(target: str) -> NamePattern:
    try:
        return NamePattern(target.removeprefix(_PATTERN))
    except ValueError as error:
        raise unread_setting(_NAME, "targets", target) from error


def _block(weights: Mapping[str, Any]) -> tuple[int, int] | None:
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy in ("group", "tensor_group") or (strategy is None and size not in (None, -1)):
        return block_size(_NAME, "group_size", [1, size])
    if strategy == "block":
        return block_size(_NAME, "block_structure", weights.get("block_structure"))
    if strategy not in (None, "channel", "tensor"):
        raise unread_setting(_NAME, "strategy", strategy)
    return None
