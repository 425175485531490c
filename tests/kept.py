"""Random matrices of kept codes, in every format that kernels and records know."""

from dataclasses import dataclass
from typing import Any

import torch

from moe_tool.quantization.kept_codes import CODE_BITS, CodeKind, KeptWeight


@dataclass(frozen=True, kw_only=True)
class Format:
    kind: CodeKind
    group: tuple[int, int]
    """0: all rows, or all columns"""
    scale: torch.dtype = torch.float32
    has_global: bool = False
    is_divisor: bool = False
    zero: torch.dtype | None = None


FORMATS = {
    "mxfp4": Format(kind="e2m1", group=(1, 32), scale=torch.uint8),
    "nvfp4": Format(kind="e2m1", group=(1, 16), scale=torch.float8_e4m3fn, has_global=True),
    "nvfp4 divided": Format(
        kind="e2m1", group=(1, 16), scale=torch.float8_e4m3fn, has_global=True, is_divisor=True
    ),
    "fp8 blocks": Format(kind="e4m3", group=(128, 128)),
    "fp8 rows": Format(kind="e4m3", group=(1, 0), scale=torch.bfloat16),
    "fp8 e8m0": Format(kind="e4m3", group=(128, 128), scale=torch.uint8),
    "fp8 tensor": Format(kind="e4m3", group=(0, 0)),
    "int4 g32": Format(kind="int4", group=(1, 32), scale=torch.bfloat16),
    "int4 g128 zeros": Format(
        kind="int4", group=(1, 128), scale=torch.float16, zero=torch.uint8
    ),
    "int4 bias": Format(kind="int4", group=(1, 64), scale=torch.float16, zero=torch.float32),
    "int8 rows": Format(kind="int8", group=(1, 0), scale=torch.bfloat16),
    "int8 zeros": Format(kind="int8", group=(1, 64), scale=torch.float16, zero=torch.uint8),
    "int8 bias": Format(kind="int8", group=(1, 32), scale=torch.float32, zero=torch.float32),
    "nf4": Format(kind="nf4", group=(1, 64)),
}  # fmt: skip


def draw_kept(name: str, shape: tuple[int, int], *, seed: int) -> KeptWeight:
    """Return a matrix of random codes without NaN, its scales between 1/4 and 2."""
    of = FORMATS[name]
    draw = torch.Generator().manual_seed(seed)
    n_out, n_in = shape
    codes = torch.randint(0, 256, (n_out, n_in * CODE_BITS[of.kind] // 8), generator=draw)
    if of.kind == "e4m3":
        codes[(codes & 127) == 127] = 1
    group = (of.group[0] or n_out, of.group[1] or n_in)
    grid = (-(-n_out // group[0]), -(-n_in // group[1]))
    numbers = torch.rand(grid, generator=draw) * 1.75 + 0.25
    more: dict[str, Any] = {}
    if of.has_global:
        more["global_scale"] = torch.rand(n_out, generator=draw) + 0.5
    if of.zero == torch.uint8:
        most = 2 ** CODE_BITS[of.kind]
        more["zero"] = torch.randint(0, most, grid, generator=draw, dtype=torch.uint8)
    elif of.zero is not None:
        more["zero"] = torch.randn(grid, generator=draw)
    exponents = torch.randint(125, 129, grid, generator=draw, dtype=torch.uint8)
    return KeptWeight(
        codes=codes.to(torch.uint8),
        kind=of.kind,
        scale=exponents if of.scale == torch.uint8 else numbers.to(of.scale),
        group=group,
        is_divisor=of.is_divisor,
        **more,
    )
