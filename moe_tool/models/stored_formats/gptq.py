"""GPTQ: integers packed along the inputs in 32-bit words, zero points along the outputs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moe_tool.formats.safetensors_index import TensorInfo
from moe_tool.models.stored_formats.code_values import look_up, scale_groups
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

_NAME, _CODES = "gptq", ".qweight"
_WORD_BITS = 32
_FORMATS = ("gptq", "gptq_v2")
_EXCEPT = "-:"
"""Beginning of a pattern of modules that are not quantized"""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    width_bits: int
    group_size: int
    """Inputs with one scale; -1: all"""
    is_reduced: bool
    """Whether zero points are stored less one, as the first version of the format has them"""
    is_ordered: bool


def stored_tensors(
    raw: Mapping[str, TensorInfo], settings: Mapping[str, Any]
) -> dict[str, StoredTensor]:
    """Return the weights of all modules with a qweight.

    Raises:
        UnsupportedModelError: the settings are not built.
        CorruptArtifactError: codes, scales and zero points do not fit together.
    """
    checked = _checked(settings)
    modules = [name.removesuffix(_CODES) for name in raw if name.endswith(_CODES)]
    return {f"{module}.weight": _tensor(raw, module, checked) for module in modules}


def _checked(settings: Mapping[str, Any]) -> _Settings:
    bits = settings.get("bits")
    if type(bits) is not int or bits not in (2, 4, 8):
        raise unread_setting(_NAME, "bits", bits)
    is_marlin = settings.get("is_marlin_format")
    form = "marlin" if is_marlin else settings.get("checkpoint_format") or _FORMATS[0]
    if form not in _FORMATS:
        raise unread_setting(_NAME, "checkpoint_format", form)
    if settings.get("pack_dtype", "int32") != "int32":
        raise unread_setting(_NAME, "pack_dtype", settings["pack_dtype"])
    others = settings.get("dynamic") or {}
    if not isinstance(others, dict) or not all(key.startswith(_EXCEPT) for key in others):
        raise unread_setting(_NAME, "dynamic", others)
    return _Settings(
        width_bits=bits,
        group_size=group_size(_NAME, settings.get("group_size")),
        is_reduced=form == _FORMATS[0],
        is_ordered=bool(settings.get("desc_act")),
    )


def _tensor(raw: Mapping[str, TensorInfo], module: str, settings: _Settings) -> StoredTensor:
    codes = raw[module + _CODES]
    scale = require_part(raw, f"{module}.scales", of=codes.name)
    zero = require_part(raw, f"{module}.qzeros", of=codes.name)
    require_dtype(codes, "I32")
    require_dtype(zero, "I32")
    require_dtype(scale, *SCALE_DTYPES)
    per_word = _WORD_BITS // settings.width_bits
    if len(codes.shape) != 2 or 0 in codes.shape or codes.shape[1] % per_word:
        raise refused(codes, f"has shape {list(codes.shape)}: no matrix in whole words")
    n_in, n_out = codes.shape[0] * per_word, codes.shape[1]
    group = n_in if settings.group_size == -1 else settings.group_size
    n_groups = -(-n_in // group)
    require_shape(scale, (n_groups, n_out))
    require_shape(zero, (n_groups, n_out // per_word))
    parts = {"codes": codes.name, "scale": scale.name, "zero": zero.name}
    order = raw.get(f"{module}.g_idx")
    if order is not None:
        require_dtype(order, "I32", "I64")
        require_shape(order, (n_in,))
        parts["order"] = order.name
    elif settings.is_ordered:
        raise refused(codes, "lacks its g_idx, which settings with desc_act need")
    gathered = 4 * n_out * n_in + 16 * n_in if settings.is_ordered else 0

    def require_plain(read: Parts) -> None:
        if not _is_plain(read, group):
            raise refused(codes, "has inputs out of order, which settings without desc_act deny")

    return StoredTensor(
        parts=parts,
        shape=(n_out, n_in),
        decode=_decoder(codes, settings, group),
        keep=None if settings.is_ordered or settings.width_bits == 2 else _keeper(settings, group),
        require_kept=require_plain,
        decode_bytes=6 * codes.size_bytes + 4 * n_out * n_in + 20 * n_out * n_groups + gathered,
    )


def _decoder(codes: TensorInfo, settings: _Settings, group: int) -> Callable[[Parts], torch.Tensor]:
    table = torch.arange(2**settings.width_bits, dtype=torch.float32)

    def decode(parts: Parts) -> torch.Tensor:
        values = look_up(_codes(parts), table)
        scale = parts["scale"].T.to(torch.float32)
        zero = look_up(_zeros(parts, settings), table).T
        if _is_plain(parts, group):
            return scale_groups(values, scale, (1, group), zero=zero)
        order = parts["order"].long()
        if int(order.min()) < 0 or int(order.max()) >= scale.shape[1]:
            raise refused(codes, f"has inputs of groups beyond its {scale.shape[1]}")
        return values.sub_(zero[:, order]).mul_(scale[:, order])

    return decode


def _keeper(settings: _Settings, group: int) -> Callable[[Parts], KeptWeight]:
    def keep(parts: Parts) -> KeptWeight:
        table = torch.arange(2**settings.width_bits, dtype=torch.float32)
        zero = look_up(_zeros(parts, settings), table).T
        return KeptWeight(
            codes=_codes(parts),
            kind="int4" if settings.width_bits == 4 else "int8",
            scale=parts["scale"].T.contiguous(),
            group=(1, group),
            zero=zero.to(torch.uint8).contiguous(),
        )

    return keep


def _codes(parts: Parts) -> torch.Tensor:
    """Return codes [out, in * bits / 8] in bytes, low bits first."""
    return parts["codes"].T.contiguous().view(torch.uint8)


def _zeros(parts: Parts, settings: _Settings) -> torch.Tensor:
    """Return zero points [groups, out * bits / 8] in bytes.

    One is added to whole words with carries: writers take it off like that.
    """
    words = parts["zero"]
    if settings.is_reduced:
        words = words + (2**_WORD_BITS - 1) // (2**settings.width_bits - 1)
    return words.view(torch.uint8)


def _is_plain(parts: Parts, group: int) -> bool:
    """Return whether inputs lie group by group."""
    order = parts.get("order")
    return order is None or torch.equal(order, torch.arange(len(order), dtype=order.dtype) // group)
