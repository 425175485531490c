"""MLX: codes of 2 to 8 bits along the inputs in 32-bit words, with a scale and a bias for a group;
all experts of a layer in one tensor."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moe_tool.formats.safetensors_index import TensorInfo
from moe_tool.models.stored_formats.code_values import (
    E2M1,
    look_up,
    lookup_bytes,
    power_of_two,
    scale_groups,
)
from moe_tool.models.stored_formats.stored_tensor import (
    SCALE_DTYPES,
    Parts,
    StoredTensor,
    group_size,
    refused,
    require_dtype,
    require_part,
    require_shape,
    unread_setting,
)
from moe_tool.quantization.kept_codes import KeptWeight

_NAME, _WEIGHT, _SCALES = "mlx", ".weight", ".scales"
_STACK = ".switch_mlp."
_NUMBERED = {
    "mlp.": {"gate_proj": "gate_proj", "down_proj": "down_proj", "up_proj": "up_proj"},
    "block_sparse_moe.": {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
}
"""Names of an expert's matrices where transformers has them one by one, by the module that holds
the experts"""
_WORD_BITS = 32
_SPANS = {3: 3, 6: 3}
"""Bytes that hold whole codes, for widths that do not divide a byte"""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    width_bits: int
    group_size: int
    is_float: bool
    """Whether codes are 4-bit floats with powers of two, as in MXFP4"""


def stored_tensors(
    raw: Mapping[str, TensorInfo], settings: Mapping[str, Any]
) -> dict[str, StoredTensor]:
    """Return the weights of all modules with scales, and stacked experts one by one.

    Raises:
        UnsupportedModelError: the settings are not built.
        CorruptArtifactError: codes, scales and biases do not fit together.
    """
    _checked(settings, "")
    found: dict[str, StoredTensor] = {}
    for name, info in raw.items():
        if name.endswith(_SCALES):
            module = name.removesuffix(_SCALES)
            codes = require_part(raw, module + _WEIGHT, of=name)
            checked = _checked(settings, module)
            for logical, row in _rows(codes):
                found[logical] = _tensor(raw, module, checked, row)
        elif _STACK in name and name.endswith(_WEIGHT) and info.dtype in SCALE_DTYPES:
            for logical, row in _rows(info):
                found[logical] = _plain(info, row)
    return found


def _rows(info: TensorInfo) -> Iterator[tuple[str, int | None]]:
    """Yield the names that a tensor's matrices have in transformers, each with its row."""
    if _STACK not in info.name:
        yield info.name, None
        return
    before, _, matrix = info.name.removesuffix(_WEIGHT).rpartition(_STACK)
    names = next((names for end, names in _NUMBERED.items() if f"{before}.".endswith(end)), {})
    if matrix not in names or len(info.shape) != 3 or 0 in info.shape:
        raise refused(info, f"with shape {list(info.shape)} is no stack of experts")
    for expert in range(info.shape[0]):
        yield f"{before}.experts.{expert}.{names[matrix]}{_WEIGHT}", expert


def _checked(settings: Mapping[str, Any], module: str) -> _Settings:
    own = settings.get(module)
    merged = {**settings, **own} if isinstance(own, dict) else settings
    mode, bits = merged.get("mode", "affine"), merged.get("bits")
    if mode not in ("affine", "mxfp4"):
        raise unread_setting(_NAME, "mode", mode)
    size = group_size(_NAME, merged.get("group_size"))
    is_float = mode == "mxfp4"
    if type(bits) is not int or bits not in ((4,) if is_float else (2, 3, 4, 6, 8)):
        raise unread_setting(_NAME, "bits", bits)
    if size < 8:
        raise unread_setting(_NAME, "group_size", size)
    return _Settings(width_bits=bits, group_size=size, is_float=is_float)


def _tensor(
    raw: Mapping[str, TensorInfo], module: str, settings: _Settings, row: int | None
) -> StoredTensor:
    codes, scale = raw[module + _WEIGHT], raw[module + _SCALES]
    names = {"codes": codes.name, "scale": scale.name}
    require_dtype(codes, "U32")
    require_dtype(scale, *(("U8",) if settings.is_float else SCALE_DTYPES))
    outer, inner = (codes.shape[:1], codes.shape[1:]) if row is not None else ((), codes.shape)
    n_bits = _WORD_BITS * inner[-1] if len(inner) == 2 else 0
    n_in = n_bits // settings.width_bits
    if n_bits == 0 or inner[0] == 0 or n_bits % settings.width_bits or n_in % settings.group_size:
        raise refused(
            codes,
            f"has shape {list(codes.shape)}: no groups of {settings.group_size} codes of "
            f"{settings.width_bits} bits",
        )
    n_out, n_groups = inner[0], n_in // settings.group_size
    require_shape(scale, (*outer, n_out, n_groups))
    if not settings.is_float:
        bias = require_part(raw, f"{module}.biases", of=codes.name)
        require_dtype(bias, *SCALE_DTYPES)
        require_shape(bias, scale.shape)
        names["bias"] = bias.name
    group = (1, settings.group_size)

    def decode(parts: Parts) -> torch.Tensor:
        values = _numbers(parts["codes"].view(torch.uint8), settings)
        if settings.is_float:
            return scale_groups(values, power_of_two(parts["scale"]), group)
        groups = scale_groups(values, parts["scale"].float(), group).view(n_out, n_groups, -1)
        return groups.add_(parts["bias"].float()[..., None]).view(n_out, n_in)

    def keep(parts: Parts) -> KeptWeight:
        return KeptWeight(
            codes=parts["codes"].view(torch.uint8),
            kind="e2m1" if settings.is_float else "int4" if settings.width_bits == 4 else "int8",
            scale=parts["scale"],
            group=group,
            zero=None if settings.is_float else parts["bias"].float(),
        )

    n_bytes = n_out * n_bits // 8
    wide = 5 * n_out * n_in if settings.width_bits in _SPANS else 0
    return StoredTensor(
        parts=names,
        shape=(n_out, n_in),
        row=row,
        decode=decode,
        keep=keep if settings.width_bits in (4, 8) else None,
        decode_bytes=lookup_bytes(n_bytes, n_out * n_in) + 16 * n_out * n_groups + wide,
    )


def _plain(info: TensorInfo, row: int | None) -> StoredTensor:
    """Return one expert's matrix of a stack that is not quantized."""
    n_out, n_in = info.shape[1:]
    return StoredTensor(
        parts={"codes": info.name},
        shape=(n_out, n_in),
        row=row,
        decode=lambda parts: parts["codes"].to(torch.float32),
        decode_bytes=8 * n_out * n_in,
    )


def _numbers(codes: torch.Tensor, settings: _Settings) -> torch.Tensor:
    """Return float32 [out, in] of codes [out, bytes], lowest bits first."""
    width = settings.width_bits
    if settings.is_float:
        return look_up(codes, E2M1)
    if width not in _SPANS:
        return look_up(codes, torch.arange(2**width, dtype=torch.float32))
    spans = codes.view(codes.shape[0], -1, _SPANS[width]).to(torch.int32)
    joined = spans[..., 0] | spans[..., 1] << 8 | spans[..., 2] << 16
    shifts = torch.arange(0, 8 * _SPANS[width], width, dtype=torch.int32)
    numbers = (joined[..., None] >> shifts).bitwise_and_(2**width - 1)
    return numbers.to(torch.float32).view(codes.shape[0], -1)
