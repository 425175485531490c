"""Logical tensor of a quantized checkpoint, and checks of the tensors that it is made from."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from moe_tool.errors import CorruptArtifactError, UnsupportedModelError
from moe_tool.formats.hostile_file import quoted
from moe_tool.formats.safetensors_index import TensorInfo
from moe_tool.quantization.kept_codes import KeptWeight

HINT = (
    "download the checkpoint again; if it was published like that, use another version of the model"
)
SCALE_DTYPES = ("F16", "BF16", "F32")
"""Dtypes of scales in formats of integers"""
Parts = Mapping[str, torch.Tensor]
"""Tensors as read, by role"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One logical tensor, made from the tensors on disk."""

    parts: Mapping[str, str]
    """Role ("codes", "scale", "zero", ...) -> name on disk; codes come first"""
    shape: tuple[int, ...]
    """Logical shape: [out, in], or [E, ...] if stacked"""
    decode: Callable[[Parts], torch.Tensor]
    """Parts -> float32 of the logical shape; one row's parts -> one row, if stacked"""
    decode_bytes: int
    """Most bytes that reading one tensor, or one row if stacked, holds at once: parts, buffers
    and result"""
    is_stacked: bool = False
    """Whether the first dimension is the expert's; every part is then read row by row"""
    row: int | None = None
    """Row of every part that this tensor is made from; None: of whole parts"""
    keep: Callable[[Parts], KeptWeight] | None = None
    """Parts -> the same codes as a weight [out, in] that kernels read; None: only decoded. Sizes
    do not depend on values: parts on the meta device tell them"""
    require_kept: Callable[[Parts], None] | None = None
    """Check of values before `keep`: a CorruptArtifactError for those that it has no place for"""

    @property
    def n_weights(self) -> int:
        """Weights of one tensor, or of one row if stacked."""
        return math.prod(self.shape[1:] if self.is_stacked else self.shape)


def refused(info: TensorInfo, reason: str) -> CorruptArtifactError:
    """Return the error for a tensor that its format cannot hold."""
    return CorruptArtifactError(f"{info.file}: tensor {quoted(info.name)} {reason}", hint=HINT)


def unread_setting(format_name: str, setting: str, value: object) -> UnsupportedModelError:
    """Return the error for a setting of a known format that is not built."""
    return UnsupportedModelError(
        f"this checkpoint is stored in {format_name} format with {setting} {quoted(value)}, "
        "which is not read",
        hint="use another version of the checkpoint: other settings, float32, bfloat16 or float16",
    )


def require_part(raw: Mapping[str, TensorInfo], name: str, *, of: str) -> TensorInfo:
    """Return the header of a part; refuse a tensor without it."""
    found = raw.get(name)
    if found is None:
        raise refused(raw[of], f"lacks its part {quoted(name)}")
    return found


def require_dtype(info: TensorInfo, *dtypes: str) -> None:
    """Refuse another dtype than the format's."""
    if info.dtype not in dtypes:
        raise refused(info, f"is stored as {info.dtype}, its format has {' or '.join(dtypes)}")


def require_shape(info: TensorInfo, *shapes: Sequence[int]) -> None:
    """Refuse another shape than those that fit the codes."""
    if info.shape not in {tuple(shape) for shape in shapes}:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise refused(info, f"has shape {list(info.shape)}, its codes want {wanted}")


def require_matrix(info: TensorInfo) -> None:
    """Refuse a shape that is no matrix's."""
    if len(info.shape) != 2 or 0 in info.shape:
        raise refused(info, f"has shape {list(info.shape)}, which is no matrix's")


def group_size(format_name: str, value: object) -> int:
    """Return the number of inputs with one scale from a setting; -1: all of them.

    Raises:
        UnsupportedModelError: it is no such number.
    """
    if type(value) is int and (value == -1 or 0 < value < 2**31):
        return value
    raise unread_setting(format_name, "group_size", value)
