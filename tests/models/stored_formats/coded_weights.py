"""Random codes of every format with the weights that they stand for, by decoders of their own.

The decoders are numpy, written from the formats' definitions; nothing of the package is used.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Coded:
    """Tensors by the ending of their names, and the weights."""

    tensors: Tensors
    weights: Floats


def e2m1(codes: Bytes) -> Floats:
    """Sign, two bits of exponent (bias 1), one of mantissa."""
    sign = np.where(codes & 8, -1.0, 1.0)
    exponent, mantissa = (codes >> 1) & 3, (codes & 1).astype(np.float64)
    normal = 2.0 ** (exponent.astype(np.float64) - 1) * (1 + mantissa / 2)
    return (sign * np.where(exponent == 0, mantissa / 2, normal)).astype(np.float32)


def e4m3(codes: Bytes) -> Floats:
    """Sign, four bits of exponent (bias 7), three of mantissa; finite codes only."""
    sign = np.where(codes & 128, -1.0, 1.0)
    exponent, mantissa = (codes >> 3) & 15, (codes & 7).astype(np.float64)
    normal = 2.0 ** (exponent.astype(np.float64) - 7) * (1 + mantissa / 8)
    return (sign * np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)).astype(np.float32)


def spread(scale: Floats, group: tuple[int, int], shape: tuple[int, int]) -> Floats:
    """Repeat each group's value for all of its rows and columns."""
    rows = np.arange(shape[0]) // group[0]
    columns = np.arange(shape[1]) // group[1]
    return scale[rows][:, columns]


def nibbles(packed: Bytes) -> Bytes:
    """Even inputs in the low half of a byte."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def random_bytes(rng: np.random.Generator, *shape: int) -> Bytes:
    return rng.integers(0, 256, shape, dtype=np.uint8)


def fp8_bytes(rng: np.random.Generator, *shape: int) -> Bytes:
    codes = random_bytes(rng, *shape)
    return np.where((codes & 0x7F) == 0x7F, np.uint8(0x30), codes)


def as_fp8(codes: Bytes) -> torch.Tensor:
    return torch.from_numpy(codes.copy()).view(torch.float8_e4m3fn)


def bf16(rng: np.random.Generator, *shape: int, size: float) -> tuple[torch.Tensor, Floats]:
    """Positive scales in bfloat16, and the same in float32."""
    made = torch.from_numpy((rng.random(shape) + 0.5).astype(np.float32) * size).bfloat16()
    bits = made.view(torch.int16).numpy().view(np.uint16).astype(np.uint32) << 16
    return made, bits.view(np.float32)


def exponents(rng: np.random.Generator, *shape: int, middle: int = 121) -> tuple[Bytes, Floats]:
    made = rng.integers(middle - 2, middle + 3, shape, dtype=np.uint8)
    return made, (2.0 ** (made.astype(np.float64) - 127)).astype(np.float32)


def fp8(
    rng: np.random.Generator,
    n_out: int,
    n_in: int,
    *,
    block: tuple[int, int] = (128, 128),
    ending: str = "weight_scale_inv",
    is_power: bool = False,
) -> Coded:
    """FP8 with a scale for a block: float32, or a power of two."""
    codes = fp8_bytes(rng, n_out, n_in)
    grid = (-(-n_out // block[0]), -(-n_in // block[1]))
    bits, scale = exponents(rng, *grid, middle=114)
    stored = torch.from_numpy(bits).view(torch.float8_e8m0fnu)
    if not is_power:
        scale = (rng.random(grid) * 2e-4 + 1e-4).astype(np.float32)
        stored = torch.from_numpy(scale)
    weights = e4m3(codes) * spread(scale, block, (n_out, n_in))
    return Coded(tensors={"weight": as_fp8(codes), ending: stored}, weights=weights)


def mxfp4(rng: np.random.Generator, n_out: int, n_in: int) -> tuple[Bytes, Bytes, Floats]:
    """Codes [out, in / 2], exponents [out, in / 32] and weights."""
    codes = random_bytes(rng, n_out, n_in // 2)
    bits, scale = exponents(rng, n_out, n_in // 32)
    return codes, bits, e2m1(nibbles(codes)) * spread(scale, (1, 32), (n_out, n_in))


def nvfp4(
    rng: np.random.Generator, n_out: int, n_in: int, *, is_divisor: bool
) -> tuple[Bytes, Bytes, Floats, Floats]:
    """Codes, FP8 scales [out, in / 16], the scale of the whole, and weights."""
    codes = random_bytes(rng, n_out, n_in // 2)
    scales = rng.integers(0x30, 0x50, (n_out, n_in // 16), dtype=np.uint8)
    whole = np.float32(rng.random() + 0.5) * np.float32(100 if is_divisor else 0.01)
    factor = e4m3(scales) / whole if is_divisor else e4m3(scales) * whole
    weights = e2m1(nibbles(codes)) * spread(factor, (1, 16), (n_out, n_in))
    return codes, scales, np.asarray(whole, dtype=np.float32), weights


def modelopt_nvfp4(rng: np.random.Generator, n_out: int, n_in: int) -> Coded:
    codes, scales, whole, weights = nvfp4(rng, n_out, n_in, is_divisor=False)
    tensors = {
        "weight": torch.from_numpy(codes),
        "weight_scale": as_fp8(scales),
        "weight_scale_2": torch.tensor(float(whole)),
        "input_scale": torch.tensor(0.01),
    }
    return Coded(tensors=tensors, weights=weights)


def packed_nvfp4(rng: np.random.Generator, n_out: int, n_in: int) -> Coded:
    codes, scales, whole, weights = nvfp4(rng, n_out, n_in, is_divisor=True)
    tensors = {
        "weight_packed": torch.from_numpy(codes),
        "weight_scale": as_fp8(scales),
        "weight_global_scale": torch.tensor([float(whole)]),
        "input_global_scale": torch.tensor([100.0]),
    }
    return Coded(tensors=tensors, weights=weights)


def words(codes: NDArray[np.int64], width_bits: int) -> torch.Tensor:
    """Pack codes [rows, n] into 32-bit words along the last dimension, lowest bits first."""
    per_word = 32 // width_bits
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per_word))).astype(np.uint64)
    made = np.zeros((padded.shape[0], padded.shape[1] // per_word), dtype=np.uint64)
    for position in range(per_word):
        made |= padded[:, position::per_word] << np.uint64(width_bits * position)
    return torch.from_numpy(made.astype(np.uint32).view(np.int32))


def packed_integers(
    rng: np.random.Generator,
    n_out: int,
    n_in: int,
    *,
    group: int = 32,
    width_bits: int = 4,
    is_symmetric: bool = True,
    is_ordered: bool = False,
) -> Coded:
    """Integers of compressed-tensors in words, with bfloat16 scales."""
    codes = rng.integers(0, 2**width_bits, (n_out, n_in))
    stored, scale = bf16(rng, n_out, n_in // group, size=0.02 / 2 ** (width_bits - 4))
    zero = np.full(scale.shape, 2 ** (width_bits - 1))
    of_input = np.arange(n_in) // group
    tensors = {
        "weight_packed": words(codes, width_bits),
        "weight_scale": stored,
        "weight_shape": torch.tensor([n_out, n_in]),
    }
    if not is_symmetric:
        zero = rng.integers(0, 2**width_bits, scale.shape)
        tensors["weight_zero_point"] = words(zero.T, width_bits).T.contiguous()
    if is_ordered:
        of_input = rng.permutation(of_input)
        tensors["weight_g_idx"] = torch.from_numpy(of_input.astype(np.int32))
    weights = (codes - zero[:, of_input]).astype(np.float32) * scale[:, of_input]
    return Coded(tensors=tensors, weights=weights)


def plain_integers(rng: np.random.Generator, n_out: int, n_in: int, *, is_whole: bool) -> Coded:
    """Signed bytes with a scale for each output, or one for all and a zero point."""
    codes = random_bytes(rng, n_out, n_in).view(np.int8)
    stored, scale = bf16(rng, *((1,) if is_whole else (n_out, 1)), size=0.001)
    tensors = {"weight": torch.from_numpy(codes), "weight_scale": stored}
    numbers = codes.astype(np.int64)
    if is_whole:
        tensors["weight_zero_point"] = torch.tensor([-7], dtype=torch.int8)
        numbers = numbers + 7
    return Coded(tensors=tensors, weights=numbers.astype(np.float32) * scale)


def channel_fp8(rng: np.random.Generator, n_out: int, n_in: int) -> Coded:
    codes = fp8_bytes(rng, n_out, n_in)
    stored, scale = bf16(rng, n_out, 1, size=1e-4)
    tensors = {"weight": as_fp8(codes), "weight_scale": stored}
    return Coded(tensors=tensors, weights=e4m3(codes) * scale)


def packed_mxfp4(rng: np.random.Generator, n_out: int, n_in: int) -> Coded:
    codes, bits, weights = mxfp4(rng, n_out, n_in)
    tensors = {"weight_packed": torch.from_numpy(codes), "weight_scale": torch.from_numpy(bits)}
    return Coded(tensors=tensors, weights=weights)


def deepseek_fp4(rng: np.random.Generator, n_out: int, n_in: int) -> Coded:
    codes, bits, weights = mxfp4(rng, n_out, n_in)
    tensors = {
        "weight": torch.from_numpy(codes.view(np.int8)),
        "scale": torch.from_numpy(bits).view(torch.float8_e8m0fnu),
    }
    return Coded(tensors=tensors, weights=weights)


def stacked_mxfp4(rng: np.random.Generator, experts: int, n_out: int, n_in: int) -> Coded:
    """gpt-oss's layout; weights are [E, in, out] as transformers' parameter."""
    made = [mxfp4(rng, n_out, n_in) for _ in range(experts)]
    codes = np.stack([codes.reshape(n_out, n_in // 32, 16) for codes, _, _ in made])
    tensors = {
        "_blocks": torch.from_numpy(codes),
        "_scales": torch.from_numpy(np.stack([bits for _, bits, _ in made])),
    }
    return Coded(tensors=tensors, weights=np.stack([w.T for _, _, w in made]))


def compressed(form: str, targets: tuple[str, ...] = ("Linear",), **weights: object) -> dict:
    """Settings of compressed-tensors with one group."""
    settings = {"type": "int", "num_bits": 4, "strategy": "group", "symmetric": True} | weights
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": list(targets), "weights": settings}},
        "ignore": ["lm_head"],
    }


FP8_BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
MXFP4 = {"quant_method": "mxfp4"}
INT4 = compressed("pack-quantized", group_size=32)
