"""bitsandbytes: NF4 and FP4 with a scale for a run of weights, and int8 with one for an output."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moe_tool.formats.safetensors_index import Checkpoint, TensorInfo
from moe_tool.models.stored_formats.code_values import look_up, lookup_bytes, scale_groups
from moe_tool.models.stored_formats.stored_tensor import (
    Parts,
    StoredTensor,
    refused,
    require_dtype,
    require_matrix,
    require_part,
    require_shape,
)
from moe_tool.quantization.kept_codes import TABLES, KeptWeight

_STATES = {f".quant_state.bitsandbytes__{kind}": kind for kind in ("nf4", "fp4")}
_SCALE, _FORM = ".SCB", ".weight_format"
_INT8_RANGE = 127
_MAX_STATE_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    """Content of the JSON that lies in a tensor beside 4-bit codes."""

    shape: tuple[int, int]
    block: int
    """Weights with one scale, row behind row"""
    nested_block: int | None
    """Scales that share one of their own; None: scales are floats"""
    nested_offset: float


def stored_tensors(
    raw: Mapping[str, TensorInfo],
    settings: Mapping[str, Any],  # noqa: ARG001
) -> dict[str, StoredTensor]:
    """Return the weights with a state of 4-bit codes or with scales of int8.

    Shapes of 4-bit weights lie in small tensors, which are read.

    Raises:
        CorruptArtifactError: codes and scales do not fit together.
        StorageError: a state cannot be read.
    """
    found = {}
    with Checkpoint(raw) as reader:
        for name in raw:
            ending = next((ending for ending in _STATES if name.endswith(ending)), None)
            if ending is not None:
                weight = name.removesuffix(ending)
                state = _read_state(reader, raw[name], _STATES[ending])
                found[weight] = _four_bits(raw, weight, raw[name], state)
            elif name.endswith(_SCALE):
                module = name.removesuffix(_SCALE)
                found[f"{module}.weight"] = _int8(raw, module)
    return found


def _four_bits(
    raw: Mapping[str, TensorInfo], weight: str, state_info: TensorInfo, state: _State
) -> StoredTensor:
    codes = require_part(raw, weight, of=state_info.name)
    n_out, n_in = state.shape
    require_dtype(codes, "U8")
    if codes.size_bytes * 2 != n_out * n_in:
        raise refused(
            codes, f"has {codes.size_bytes} bytes, {n_out} * {n_in} codes of 4 bits have not"
        )
    n_scales = -(-n_out * n_in // state.block)
    wanted = {"absmax": ("U8" if state.nested_block else "F32", n_scales), "quant_map": ("F32", 16)}
    if state.nested_block:
        wanted["nested_absmax"] = ("F32", -(-n_scales // state.nested_block))
        wanted["nested_quant_map"] = ("F32", 256)
    names = {"codes": codes.name, "state": state_info.name}
    for role, (dtype, size) in wanted.items():
        part = require_part(raw, f"{weight}.{role}", of=codes.name)
        require_dtype(part, dtype)
        require_shape(part, (size,))
        names[role] = part.name

    def decode(parts: Parts) -> torch.Tensor:
        values = look_up(_even_low(parts["codes"]), parts["quant_map"]).view(1, -1)
        return scale_groups(values, _scales(parts, state).view(1, -1), (1, state.block)).view(
            n_out, n_in
        )

    def require_nf4(parts: Parts) -> None:
        if not torch.equal(parts["quant_map"], torch.tensor(TABLES["nf4"])):
            raise refused(codes, "has a quant_map that is not NF4's")

    def keep(parts: Parts) -> KeptWeight:
        return KeptWeight(
            codes=_even_low(parts["codes"]).view(n_out, -1),
            kind="nf4",
            scale=_scales(parts, state).view(-1, max(1, n_in // state.block)),
            group=(max(1, state.block // n_in), min(state.block, n_in)),
        )

    # A run of weights fills whole rows, or a row whole runs.
    is_even = n_in % 2 == 0 and (n_in % state.block == 0 or state.block % n_in == 0)
    is_nf4 = state_info.name.endswith("nf4")
    return StoredTensor(
        parts=names,
        shape=state.shape,
        decode=decode,
        keep=keep if is_nf4 and is_even else None,
        require_kept=require_nf4,
        decode_bytes=lookup_bytes(codes.size_bytes, n_out * n_in)
        + codes.size_bytes
        + 16 * n_scales,
    )


def _int8(raw: Mapping[str, TensorInfo], module: str) -> StoredTensor:
    """Return a weight code * (scale / 127)."""
    scale = raw[module + _SCALE]
    codes = require_part(raw, f"{module}.weight", of=scale.name)
    require_dtype(codes, "I8")
    require_dtype(scale, "F32")
    require_matrix(codes)
    n_out, n_in = codes.shape
    require_shape(scale, (n_out,))
    names = {"codes": codes.name, "scale": scale.name}
    form = raw.get(module + _FORM)
    if form is not None:
        require_dtype(form, "U8")
        require_shape(form, (), (1,))
        names["form"] = form.name

    def require_rows(parts: Parts) -> None:
        if form is not None and bool(parts["form"].any()):
            raise refused(form, "says that codes do not lie row by row")

    def decode(parts: Parts) -> torch.Tensor:
        require_rows(parts)
        factors = parts["scale"] / _INT8_RANGE
        return parts["codes"].to(torch.float32).mul_(factors[:, None])

    def keep(parts: Parts) -> KeptWeight:
        return KeptWeight(
            codes=parts["codes"].view(torch.uint8) ^ 128,
            kind="int8",
            scale=parts["scale"][:, None],
            group=(1, n_in),
            global_scale=torch.full((n_out,), float(_INT8_RANGE)),
            is_divisor=True,
        )

    return StoredTensor(
        parts=names,
        shape=(n_out, n_in),
        decode=decode,
        keep=keep,
        require_kept=require_rows,
        decode_bytes=5 * n_out * n_in + 8 * n_out,
    )


def _even_low(codes: torch.Tensor) -> torch.Tensor:
    """Return bytes with the first of two codes in the low half, which bitsandbytes has high."""
    return (codes.view(-1) >> 4).bitwise_or_(codes.view(-1) << 4)


def _scales(parts: Parts, state: _State) -> torch.Tensor:
    if state.nested_block is None:
        return parts["absmax"]
    values = parts["nested_quant_map"][parts["absmax"].to(torch.int32)].view(1, -1)
    made = scale_groups(values, parts["nested_absmax"].view(1, -1), (1, state.nested_block))
    return made.view(-1).add_(state.nested_offset)


def _read_state(reader: Checkpoint, info: TensorInfo, kind: str) -> _State:
    require_dtype(info, "U8")
    if info.size_bytes > _MAX_STATE_BYTES:
        raise refused(info, f"has {info.size_bytes} bytes, wanted at most {_MAX_STATE_BYTES}")
    try:
        raw = json.loads(reader.read_bytes(info.name))
    except (ValueError, RecursionError) as error:
        raise refused(info, "is not JSON") from error
    if not isinstance(raw, dict) or raw.get("quant_type") != kind:
        raise refused(info, f"is not the state of {kind} codes")

    def size(value: object) -> int:
        if type(value) is not int or not 0 < value < 2**31:
            raise refused(info, f"has a size that is none: {str(value)[:32]}")
        return value

    shape, nested = raw.get("shape"), raw.get("nested_blocksize")
    if not isinstance(shape, list) or len(shape) != 2:
        raise refused(info, "has no shape of a matrix")
    offset = raw.get("nested_offset", 0.0)
    if type(offset) not in (int, float):
        raise refused(info, "has no number as nested_offset")
    return _State(
        shape=(size(shape[0]), size(shape[1])),
        block=size(raw.get("blocksize")),
        nested_block=None if nested is None else size(nested),
        nested_offset=float(offset),
    )
