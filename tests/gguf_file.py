"""Writer of GGUF files and decoders of their blocks, from the definition of the format."""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
NUMBERS = {
    **{"F32": 0, "F16": 1, "Q4_0": 2, "Q5_0": 6, "Q8_0": 8, "Q4_K": 12, "Q5_K": 13},
    **{"Q6_K": 14, "BF16": 30, "MXFP4": 39},
}
BLOCKS = {
    **{"Q4_0": (32, 18), "Q5_0": (32, 22), "Q8_0": (32, 34), "MXFP4": (32, 17)},
    **{"Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210)},
}
_SCALES = {"Q4_0": (0,), "Q5_0": (0,), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Places of the half-precision numbers in a block"""
_SIZES = {"Q4_0": 0.02, "Q5_0": 0.02, "Q8_0": 0.003, "Q4_K": 4e-4, "Q5_K": 2e-4, "Q6_K": 1e-4}


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufData:
    kind: str
    data: NDArray[np.generic]
    """Bytes of rows, or floats, in the shape of the tensor"""

    @property
    def shape(self) -> tuple[int, ...]:
        n_weights, n_bytes = BLOCKS.get(self.kind, (1, 2 if self.kind == "BF16" else 1))
        if self.kind in ("F32", "F16"):
            return self.data.shape
        return (*self.data.shape[:-1], self.data.shape[-1] // n_bytes * n_weights)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value_bytes(value: object) -> bytes:
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<Ii", 5, value)
        case str():
            return struct.pack("<I", 8) + text(value)
        case [str(), *_]:
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(text(x) for x in value)
        case list():
            return struct.pack("<IIQ", 9, 6, len(value)) + struct.pack(f"<{len(value)}f", *value)
    raise TypeError(value)


def gguf_bytes(
    metadata: Mapping[str, object], tensors: Mapping[str, GgufData], *, alignment: int = 32
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(text(key) + value_bytes(value) for key, value in metadata.items())
    body = b""
    for name, tensor in tensors.items():
        shape = tuple(reversed(tensor.shape))
        head += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        head += struct.pack("<IQ", NUMBERS[tensor.kind], len(body))
        body += tensor.data.tobytes()
        body += bytes(-len(body) % alignment)
    return head + bytes(-len(head) % alignment) + body


def random_tensor(rng: np.random.Generator, kind: str, *shape: int) -> tuple[GgufData, Floats]:
    """Random codes with scales of a useful size, and the weights that they stand for."""
    if kind not in BLOCKS:
        values = rng.normal(0, 0.2, shape).astype(np.float32)
        if kind == "BF16":
            values = (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
            half = (values.view(np.uint32) >> 16).astype(np.uint16)
            return GgufData(kind=kind, data=half.view(np.uint8)), values
        stored = values.astype(np.float16) if kind == "F16" else values
        return GgufData(kind=kind, data=stored), stored.astype(np.float32)
    n_weights, n_bytes = BLOCKS[kind]
    n_blocks = int(np.prod(shape)) // n_weights
    blocks = rng.integers(0, 256, (n_blocks, n_bytes), dtype=np.uint8)
    for place in _SCALES.get(kind, ()):
        scale = ((rng.random(n_blocks) + 0.5) * _SIZES[kind]).astype(np.float16)
        blocks[:, place : place + 2] = scale.view(np.uint8).reshape(-1, 2)
    if kind == "MXFP4":
        blocks[:, 0] = rng.integers(119, 124, n_blocks)
    data = blocks.reshape(*shape[:-1], shape[-1] // n_weights * n_bytes)
    return GgufData(kind=kind, data=data), DECODERS[kind](blocks).reshape(shape)


def _half(blocks: Bytes, place: int) -> Floats:
    return blocks[:, place : place + 2].copy().view(np.float16).astype(np.float32)[:, 0]


def _nibble(byte: Bytes, *, is_high: bool) -> Bytes:
    return byte >> 4 if is_high else byte & 15


def _q8_0(blocks: Bytes) -> Floats:
    return _half(blocks, 0)[:, None] * blocks[:, 2:].view(np.int8).astype(np.float32)


def _q4_0(blocks: Bytes) -> Floats:
    made = np.empty((len(blocks), 32), dtype=np.float32)
    for i in range(32):
        code = _nibble(blocks[:, 2 + i % 16], is_high=i >= 16)
        made[:, i] = (code.astype(np.float32) - 8) * _half(blocks, 0)
    return made


def _q5_0(blocks: Bytes) -> Floats:
    made = np.empty((len(blocks), 32), dtype=np.float32)
    for i in range(32):
        code = _nibble(blocks[:, 6 + i % 16], is_high=i >= 16)
        code = code | ((blocks[:, 2 + i // 8] >> (i % 8)) & 1) << 4
        made[:, i] = (code.astype(np.float32) - 16) * _half(blocks, 0)
    return made


def _mxfp4(blocks: Bytes) -> Floats:
    positive = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)
    made = np.empty((len(blocks), 32), dtype=np.float32)
    scale = (2.0 ** (blocks[:, 0].astype(np.float64) - 127)).astype(np.float32)
    for i in range(32):
        code = _nibble(blocks[:, 1 + i % 16], is_high=i >= 16)
        made[:, i] = positive[code & 7] * np.where(code & 8, -1, 1).astype(np.float32) * scale
    return made


def _scale_and_minimum(packed: Bytes, group: int) -> tuple[Floats, Floats]:
    """Six bits each: of groups from the fourth on, the upper two lie with the first groups'."""
    if group < 4:
        scale, minimum = packed[:, group] & 63, packed[:, group + 4] & 63
    else:
        scale = (packed[:, group + 4] & 15) | (packed[:, group - 4] >> 6) << 4
        minimum = (packed[:, group + 4] >> 4) | (packed[:, group] >> 6) << 4
    return scale.astype(np.float32), minimum.astype(np.float32)


def _k_quant(blocks: Bytes, *, has_fifth_bit: bool) -> Floats:
    codes = 48 if has_fifth_bit else 16
    made = np.empty((len(blocks), 256), dtype=np.float32)
    for i in range(256):
        scale, minimum = _scale_and_minimum(blocks[:, 4:16], i // 32)
        code = _nibble(blocks[:, codes + i // 64 * 32 + i % 32], is_high=i % 64 >= 32)
        if has_fifth_bit:
            code = code | ((blocks[:, 16 + i % 32] >> (i // 32)) & 1) << 4
        number = _half(blocks, 0) * scale * code.astype(np.float32)
        made[:, i] = number - _half(blocks, 2) * minimum
    return made


def _q6_k(blocks: Bytes) -> Floats:
    made = np.empty((len(blocks), 256), dtype=np.float32)
    for i in range(256):
        half, quarter, at = i // 128, i % 128 // 32, i % 32
        low = _nibble(blocks[:, 64 * half + 32 * (quarter % 2) + at], is_high=quarter >= 2)
        high = (blocks[:, 128 + 32 * half + at] >> (2 * quarter)) & 3
        code = (low | high << 4).astype(np.float32) - 32
        scale = blocks[:, 192 + i // 16].view(np.int8).astype(np.float32)
        made[:, i] = _half(blocks, 208) * scale * code
    return made


DECODERS: dict[str, Callable[[Bytes], Floats]] = {
    "Q4_0": _q4_0,
    "Q5_0": _q5_0,
    "Q8_0": _q8_0,
    "MXFP4": _mxfp4,
    "Q4_K": lambda blocks: _k_quant(blocks, has_fifth_bit=False),
    "Q5_K": lambda blocks: _k_quant(blocks, has_fifth_bit=True),
    "Q6_K": _q6_k,
}
