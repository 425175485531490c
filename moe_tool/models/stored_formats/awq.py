"""AWQ: integers of 4 bits, eight outputs in a 32-bit word in an order of its own."""

from collections.abc import Mapping
from typing import Any

import torch

from moe_tool.formats.safetensors_index import TensorInfo
from moe_tool.models.stored_formats.code_values import scale_groups
from moe_tool.models.stored_formats.stored_tensor import (
    SCALE_DTYPES,
    Parts,
    StoredTensor,
    group_size,
    refused,
    require_dtype,
    require_matrix,
    require_part,
    require_shape,
    unread_setting,
)
from moe_tool.quantization.kept_codes import KeptWeight

_NAME, _CODES = "awq", ".qweight"
_PER_WORD = 8
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Place of each of eight outputs in a word, in half bytes from the lowest"""
_BUILT: dict[str, object] = {"bits": 4, "zero_point": True}


def stored_tensors(
    raw: Mapping[str, TensorInfo], settings: Mapping[str, Any]
) -> dict[str, StoredTensor]:
    """Return the weights of all modules with a qweight.

    Raises:
        UnsupportedModelError: the settings are not built.
        CorruptArtifactError: codes, scales and zero points do not fit together.
    """
    for key, value in _BUILT.items():
        if settings.get(key, value) != value:
            raise unread_setting(_NAME, key, settings[key])
    if str(settings.get("version", "gemm")).lower() != "gemm":
        raise unread_setting(_NAME, "version", settings["version"])
    size = group_size(_NAME, settings.get("group_size"))
    modules = [name.removesuffix(_CODES) for name in raw if name.endswith(_CODES)]
    return {f"{module}.weight": _tensor(raw, module, size) for module in modules}


def _tensor(raw: Mapping[str, TensorInfo], module: str, size: int) -> StoredTensor:
    codes = raw[module + _CODES]
    scale = require_part(raw, f"{module}.scales", of=codes.name)
    zero = require_part(raw, f"{module}.qzeros", of=codes.name)
    require_dtype(codes, "I32")
    require_dtype(zero, "I32")
    require_dtype(scale, *SCALE_DTYPES)
    require_matrix(codes)
    n_in, n_out = codes.shape[0], _PER_WORD * codes.shape[1]
    group = (1, n_in if size == -1 else size)
    if n_in % group[1]:
        raise refused(codes, f"has {n_in} inputs, which groups of {group[1]} do not divide")
    n_groups = n_in // group[1]
    require_shape(scale, (n_groups, n_out))
    require_shape(zero, (n_groups, codes.shape[1]))

    def decode(parts: Parts) -> torch.Tensor:
        values = torch.empty(n_out, n_in).copy_(_unpacked(parts["codes"]).T)
        factors = parts["scale"].T.to(torch.float32)
        return scale_groups(values, factors, group, zero=_unpacked(parts["zero"]).T.float())

    def keep(parts: Parts) -> KeptWeight:
        wide = _unpacked(parts["codes"]).T
        return KeptWeight(
            codes=(wide[:, 0::2] | wide[:, 1::2] << 4).contiguous(),
            kind="int4",
            scale=parts["scale"].T.contiguous(),
            group=group,
            zero=_unpacked(parts["zero"]).T.contiguous(),
        )

    return StoredTensor(
        parts={"codes": codes.name, "scale": scale.name, "zero": zero.name},
        shape=(n_out, n_in),
        decode=decode,
        keep=keep if n_in % 2 == 0 else None,
        decode_bytes=codes.size_bytes + 5 * n_out * n_in + 16 * n_out * n_groups,
    )


def _unpacked(words: torch.Tensor) -> torch.Tensor:
    """Return codes uint8 [rows, out] of words [rows, out / 8]."""
    packed = words.view(torch.uint8).view(*words.shape, _PER_WORD // 2)
    made = torch.empty(*words.shape, _PER_WORD, dtype=torch.uint8)
    for output, place in enumerate(_PLACES):
        torch.bitwise_right_shift(packed[..., place // 2], 4 * (place % 2), out=made[..., output])
    return made.bitwise_and_(15).view(words.shape[0], -1)
