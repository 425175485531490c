"""ModelOpt's FP8 and NVFP4, told by config.json or by hf_quant_config.json alone."""

from collections.abc import Mapping
from typing import Any

from moe_tool.formats.safetensors_index import TensorInfo
from moe_tool.models.stored_formats.fp8 import fp8_tensor
from moe_tool.models.stored_formats.nvfp4 import nvfp4_matrix
from moe_tool.models.stored_formats.stored_tensor import (
    StoredTensor,
    refused,
    require_part,
    unread_setting,
)

_ALGORITHMS = (None, "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", "MIXED_PRECISION")
"""Algorithms that are read; None: only the cache is to be quantized"""
_WEIGHT, _SCALE, _WHOLE = ".weight", "_scale", "_scale_2"


def stored_tensors(
    raw: Mapping[str, TensorInfo], settings: Mapping[str, Any]
) -> dict[str, StoredTensor]:
    """Return the weights; each tensor's dtype tells which of both formats it has.

    Raises:
        UnsupportedModelError: another algorithm.
        CorruptArtifactError: codes and scales do not fit together.
    """
    if settings.get("quant_algo") not in _ALGORITHMS:
        raise unread_setting("modelopt", "quant_algo", settings.get("quant_algo"))
    found = {}
    for name, info in raw.items():
        if not name.endswith(_WEIGHT) or info.dtype not in ("U8", "F8_E4M3"):
            continue
        if name + _SCALE not in raw:
            raise refused(info, "holds codes without a scale")
        scale = require_part(raw, name + _SCALE, of=name)
        if info.dtype == "U8":
            whole = require_part(raw, name + _WHOLE, of=name)
            found[name] = nvfp4_matrix(info, scale, whole, is_divisor=False)
        else:
            found[name] = fp8_tensor(info, scale, None)
    return found
