"""MXFP4: 4-bit floats with a power of two for 32 of them; gpt-oss has all experts of a layer in one
tensor."""

from collections.abc import Mapping
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
    Parts,
    StoredTensor,
    refused,
    require_dtype,
    require_part,
    require_shape,
)
from moe_tool.quantization.kept_codes import KeptWeight

_BLOCKS, _SCALES = "_blocks", "_scales"
_GROUP = 32


def stored_tensors(
    raw: Mapping[str, TensorInfo],
    settings: Mapping[str, Any],  # noqa: ARG001
) -> dict[str, StoredTensor]:
    """Return gpt-oss's experts, [E, in, out]: transposed, as transformers has them.

    Raises:
        CorruptArtifactError: codes and scales do not fit together.
    """
    found = {}
    for name, info in raw.items():
        if name.endswith(_BLOCKS):
            stem = name.removesuffix(_BLOCKS)
            found[stem] = _stacked(info, require_part(raw, stem + _SCALES, of=name))
    return found


def mxfp4_matrix(codes: TensorInfo, scale: TensorInfo) -> StoredTensor:
    """Return a matrix of codes [out, in / 2] and exponents [out, in / 32].

    Raises:
        CorruptArtifactError: they do not fit together.
    """
    require_dtype(codes, "I8", "U8")
    require_dtype(scale, "U8", "F8_E8M0")
    if len(codes.shape) != 2 or 0 in codes.shape or 2 * codes.shape[1] % _GROUP:
        raise refused(codes, f"has shape {list(codes.shape)}: no groups of {_GROUP} codes")
    n_out, n_in = codes.shape[0], 2 * codes.shape[1]
    require_shape(scale, (n_out, n_in // _GROUP))
    return StoredTensor(
        parts={"codes": codes.name, "scale": scale.name},
        shape=(n_out, n_in),
        decode=_decode,
        keep=_keep,
        decode_bytes=lookup_bytes(codes.size_bytes, n_out * n_in) + 5 * scale.size_bytes,
    )


def _stacked(codes: TensorInfo, scale: TensorInfo) -> StoredTensor:
    """Return experts of codes [E, out, in / 32, 16] and exponents [E, out, in / 32]."""
    require_dtype(codes, "U8")
    require_dtype(scale, "U8", "F8_E8M0")
    if len(codes.shape) != 4 or 2 * codes.shape[3] != _GROUP or 0 in codes.shape:
        raise refused(
            codes, f"has shape {list(codes.shape)}, wanted experts, outputs, groups and 16 bytes"
        )
    experts, n_out, n_groups, _ = codes.shape
    require_shape(scale, (experts, n_out, n_groups))
    n_weights = n_out * n_groups * _GROUP

    def decode(parts: Parts) -> torch.Tensor:
        return _decode({"codes": parts["codes"].flatten(1), "scale": parts["scale"]}).T

    return StoredTensor(
        parts={"codes": codes.name, "scale": scale.name},
        shape=(experts, n_groups * _GROUP, n_out),
        decode=decode,
        keep=lambda parts: _keep({**parts, "codes": parts["codes"].flatten(1)}),
        decode_bytes=lookup_bytes(n_weights // 2, n_weights) + 5 * n_out * n_groups,
        is_stacked=True,
    )


def _keep(parts: Parts) -> KeptWeight:
    return KeptWeight(
        codes=parts["codes"].view(torch.uint8),
        kind="e2m1",
        scale=parts["scale"].view(torch.uint8),
        group=(1, _GROUP),
    )


def _decode(parts: Parts) -> torch.Tensor:
    values = look_up(parts["codes"].view(torch.uint8), E2M1)
    return scale_groups(values, power_of_two(parts["scale"]), (1, _GROUP))
