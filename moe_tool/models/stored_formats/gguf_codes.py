"""Blocks of GGUF types taken apart into the codes, scales and biases that kernels read."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from moe_tool.formats.gguf_header import BLOCKS
from moe_tool.quantization.kept_codes import MIDDLES, CodeKind, KeptWeight

_N_BYTES = {name: n_bytes for name, _, n_bytes in BLOCKS.values()}
_Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Codes of blocks [rows, blocks, bytes]: one per weight, uint8 [rows, blocks, weights]; a scale
for each group; a float32 bias for each, or None"""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufForm:
    """How the codes of a type are kept."""

    codes: CodeKind
    n_inputs: int
    """Inputs that share a scale"""
    has_bias: bool = False
    is_wide: bool = False
    """Whether scales are made float32: those of another type are"""


def common_form(kinds: Collection[str]) -> GgufForm | None:
    """Return the form that keeps the codes of all these types; None: there is none.

    A file's experts are often of several types, Q4_K and Q6_K for instance, but those of a bundle
    have one form. Integers of all types fit into bytes with a float32 scale and bias for a group.
    """
    found = {_TYPES[kind][0] if kind in _TYPES else None for kind in kinds}
    forms = [form for form in found if form is not None]
    if len(forms) != len(found) or len(found) == 0:
        return None
    if len(forms) == 1:
        return forms[0]
    if not all(form.codes in MIDDLES for form in forms):
        return None
    return GgufForm(
        codes="int8",
        n_inputs=min(form.n_inputs for form in forms),
        has_bias=any(form.has_bias for form in forms),
        is_wide=True,
    )


def kept_weight(read: torch.Tensor, kind: str, form: GgufForm) -> KeptWeight:
    """Return a matrix of blocks [out, bytes] in its codes, without any rounding.

    Args:
        read: blocks as they lie in the file.
        kind: their type.
        form: a `common_form` of this type, perhaps with others.
    """
    n_out = read.shape[0]
    own, middle, take = _TYPES[kind]
    blocks = take(read.view(n_out, -1, _N_BYTES[kind]))
    codes, scale, bias = (None if part is None else part.reshape(n_out, -1) for part in blocks)
    assert codes is not None and scale is not None
    if form.is_wide:
        scale = scale.to(torch.float32)
    if form.has_bias and bias is None:  # exact: the products of codes and scales have 24 bits
        bias = scale * -middle
    elif not form.has_bias:
        codes = codes + (MIDDLES.get(form.codes, 0) - middle)
    n_parts = own.n_inputs // form.n_inputs
    if n_parts > 1:
        scale = scale.repeat_interleave(n_parts, dim=1)
        bias = None if bias is None else bias.repeat_interleave(n_parts, dim=1)
    if form.codes != "int8":
        codes = codes[:, 0::2] | codes[:, 1::2] << 4
    return KeptWeight(
        codes=codes, kind=form.codes, scale=scale, group=(1, form.n_inputs), zero=bias
    )


def _half(blocks: torch.Tensor, place: int) -> torch.Tensor:
    """Return the half-precision number of each block, [rows, blocks, 1]."""
    return blocks[..., place : place + 2].contiguous().view(torch.float16)


def _split(packed: torch.Tensor, *extents: int) -> torch.Tensor:
    return packed.view(*packed.shape[:-1], *extents)


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Return low nibbles of 16 bytes, then their high ones, as 32 codes."""
    return torch.cat((packed & 15, packed >> 4), dim=-1)


def _q8_0(blocks: torch.Tensor) -> _Parts:
    return blocks[..., 2:] ^ 128, _half(blocks, 0), None


def _q4_0(blocks: torch.Tensor) -> _Parts:
    return _nibbles(blocks[..., 2:]), _half(blocks, 0), None


def _q5_0(blocks: torch.Tensor) -> _Parts:
    shifts = torch.arange(8, dtype=torch.uint8)
    fifth = (blocks[..., 2:6, None] >> shifts & 1).flatten(-2)
    return _nibbles(blocks[..., 6:]) | fifth << 4, _half(blocks, 0), None


def _mxfp4(blocks: torch.Tensor) -> _Parts:
    return _nibbles(blocks[..., 1:]), blocks[..., :1].contiguous(), None


def _groups(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and bias, float32 [rows, blocks, 8], of Q4_K and Q5_K.

    Six bits each; of the last four groups, the upper two lie with those of the first four.
    """
    first, second, last = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    scale = torch.cat((first & 63, last & 15 | first >> 6 << 4), dim=-1)
    minimum = torch.cat((second & 63, last >> 4 | second >> 6 << 4), dim=-1)
    return _half(blocks, 0).float() * scale, -(_half(blocks, 2).float() * minimum)


def _pairs_of_groups(packed: torch.Tensor) -> torch.Tensor:
    """Return 256 codes of 128 bytes: 32 bytes hold one group low and the next one high."""
    bytes_ = _split(packed, 4, 32)
    return torch.stack((bytes_ & 15, bytes_ >> 4), dim=-2).flatten(-3)


def _q4_k(blocks: torch.Tensor) -> _Parts:
    return _pairs_of_groups(blocks[..., 16:]), *_groups(blocks)


def _q5_k(blocks: torch.Tensor) -> _Parts:
    shifts = torch.arange(8, dtype=torch.uint8)[:, None]
    fifth = (blocks[..., None, 16:48] >> shifts & 1).flatten(-2)
    return _pairs_of_groups(blocks[..., 48:]) | fifth << 4, *_groups(blocks)


def _q6_k(blocks: torch.Tensor) -> _Parts:
    low = _split(blocks[..., :128], 2, 2, 32)
    low = torch.stack((low & 15, low >> 4), dim=-3).flatten(-3, -2)  # [..., 2, 4, 32]
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
    high = _split(blocks[..., 128:192], 2, 1, 32) >> shifts & 3
    scale = _half(blocks, 208).float() * blocks[..., 192:208].view(torch.int8)
    return (low | high << 4).flatten(-3), scale, None


_TYPES: dict[str, tuple[GgufForm, int, Callable[[torch.Tensor], _Parts]]] = {
    "Q8_0": (GgufForm(codes="int8", n_inputs=32), 128, _q8_0),
    "Q4_0": (GgufForm(codes="int4", n_inputs=32), 8, _q4_0),
    "Q5_0": (GgufForm(codes="int8", n_inputs=32), 16, _q5_0),
    "MXFP4": (GgufForm(codes="e2m1", n_inputs=32), 0, _mxfp4),
    "Q4_K": (GgufForm(codes="int4", n_inputs=32, has_bias=True, is_wide=True), 0, _q4_k),
    "Q5_K": (GgufForm(codes="int8", n_inputs=32, has_bias=True, is_wide=True), 0, _q5_k),
    "Q6_K": (GgufForm(codes="int8", n_inputs=16, is_wide=True), 32, _q6_k),
}
"""Form of a type alone, the code that stands for zero where there is no bias, and what takes its
blocks apart"""
