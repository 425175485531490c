"""Seeded wrong changes of a GGUF file: counts, metadata, tensor infos, alignment, data and size."""

import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fuzz_formats.mutations import CONFIG, Change, change_leaf
from tests.gguf_file import NUMBERS, GgufData, text, value_bytes

FILE = "model.gguf"
_ALIGNMENT = 32
_HUGE = (0, 1, 3, 2**31, 2**32 - 1, 2**40, 2**55, 2**62, 2**63, 2**64 - 1)


@dataclass(slots=True, kw_only=True)
class _Info:
    """Entry of a tensor in the header."""

    extents: list[int]
    number: int
    offset: int
    data: bytes


@dataclass(slots=True, kw_only=True)
class GgufContents:
    """GGUF file and config.json taken apart, to be put together again with one thing changed."""

    config: dict[str, Any]
    metadata: list[bytes]
    """Keys with their values, encoded"""
    infos: list[tuple[str, _Info]]
    version: int = 3
    extra_tensors: int = 0
    """Tensors that the header counts beside those that there are"""
    extra_keys: int = 0

    @classmethod
    def of(
        cls, config: dict[str, Any], metadata: dict[str, object], tensors: dict[str, GgufData]
    ) -> "GgufContents":
        infos, offset = [], 0
        for name, tensor in tensors.items():
            data = tensor.data.tobytes()
            extents, number = list(reversed(tensor.shape)), NUMBERS[tensor.kind]
            infos.append((name, _Info(extents=extents, number=number, offset=offset, data=data)))
            offset += len(data) + -len(data) % _ALIGNMENT
        pairs = [text(key) + value_bytes(value) for key, value in metadata.items()]
        return cls(config=config, metadata=pairs, infos=infos)

    def write(self, folder: Path) -> None:
        """Write config.json and the file of weights."""
        (folder / CONFIG).write_text(json.dumps(self.config))
        head = self.header()
        body = b"".join(i.data + bytes(-len(i.data) % _ALIGNMENT) for _, i in self.infos)
        (folder / FILE).write_bytes(head + bytes(-len(head) % _ALIGNMENT) + body)

    def header(self) -> bytes:
        """Return everything before the data."""
        n_tensors, n_keys = len(self.infos) + self.extra_tensors, len(self.metadata)
        counts = (self.version, n_tensors % 2**64, (n_keys + self.extra_keys) % 2**64)
        head = b"GGUF" + struct.pack("<IQQ", *counts) + b"".join(self.metadata)
        for name, info in self.infos:
            extents = struct.pack(f"<{len(info.extents)}Q", *info.extents)
            head += text(name) + struct.pack("<I", len(info.extents)) + extents
            head += struct.pack("<IQ", info.number, info.offset)
        return head


Mutation = Callable[[GgufContents, random.Random], str]


def _type(c: GgufContents, rng: random.Random) -> str:
    name, info = rng.choice(c.infos)
    info.number = rng.choice([*NUMBERS.values(), 3, 10, 16, 24, 31, 40, 99, 2**32 - 1])
    return f"{name}: type {info.number}"


def _extents(c: GgufContents, rng: random.Random) -> str:
    name, info = rng.choice(c.infos)
    at = rng.randrange(len(info.extents))
    near = [info.extents[at] * 2, info.extents[at] // 2, info.extents[at] + 1]
    how = rng.choice(["one", "one", "turned", "flat", "more", "none", "many"])
    if how == "one":
        info.extents[at] = rng.choice([*_HUGE, *near])
    elif how == "turned":
        info.extents.reverse()
    elif how == "flat":
        whole = 1
        for extent in info.extents:
            whole *= extent
        info.extents = [whole]
    else:
        info.extents = {"more": [*info.extents, 1], "none": [], "many": [1] * 5000}[how]
    return f"{name}: {how} {info.extents[:6]}"


def _offset(c: GgufContents, rng: random.Random) -> str:
    name, info = rng.choice(c.infos)
    other = rng.choice(c.infos)[1].offset
    info.offset = rng.choice([*_HUGE, info.offset + 32, info.offset ^ 32, info.offset + 1, other])
    return f"{name}: at {info.offset}"


def _swap(c: GgufContents, rng: random.Random) -> str:
    a, b = rng.sample(range(len(c.infos)), 2)
    (first, one), (second, two) = c.infos[a], c.infos[b]
    c.infos[a], c.infos[b] = (second, one), (first, two)
    return f"{first} and {second} swapped"


def _name(c: GgufContents, rng: random.Random) -> str:
    at = rng.randrange(len(c.infos))
    name, info = c.infos[at]
    new = rng.choice([
        "", "x", name + ".weight", name.replace("0", "99"), name.replace("weight", "bias"),
        rng.choice(c.infos)[0], "\u2028\n", "a" * 70_000, "blk.99999999999.attn_q.weight",
    ])  # fmt: skip
    c.infos[at] = (new, info)
    return f"{name}: now {new[:60]!r}"


def _without(c: GgufContents, rng: random.Random) -> str:
    name, _ = c.infos.pop(rng.randrange(len(c.infos)))
    offset = 0
    for _, info in c.infos:
        info.offset, offset = offset, offset + len(info.data) + -len(info.data) % _ALIGNMENT
    return f"without {name}"


def _counts(c: GgufContents, rng: random.Random) -> str:
    key = rng.choice(["version", "extra_tensors", "extra_keys"])
    value = rng.choice([0, 1, 2, 4, 2**31]) if key == "version" else rng.choice([-1, 1, *_HUGE[3:]])
    setattr(c, key, value)
    return f"{key} {value}"


def _metadata(c: GgufContents, rng: random.Random) -> str:
    count = rng.choice(_HUGE)
    key = text(rng.choice(["x", "general.alignment", "general.architecture", "split.count", ""]))
    value = rng.choice([
        struct.pack("<II", 4, count % 2**32), struct.pack("<IQ", 10, count),
        struct.pack("<Id", 12, float("nan")), struct.pack("<I?", 7, True),
        struct.pack("<I", 8) + text("llama"), struct.pack("<IQ", 8, count),
        struct.pack("<IIQ", 9, 8, count), struct.pack("<IIQ", 9, 0, count),
        struct.pack("<IIQ", 9, 9, count), struct.pack("<I", 13 + count % 2**31),
        struct.pack("<IIQ", 9, 9, 1) * 3000, struct.pack("<I", 8) + text("\u2028\n\x1b[31m"),
    ])  # fmt: skip
    c.metadata.insert(rng.randrange(len(c.metadata) + 1), key + value)
    if rng.random() < 0.5:
        c.metadata.pop(rng.randrange(len(c.metadata)))
    return f"metadata {key[8:]!r}: {value[:24]!r}"


def _alignment(c: GgufContents, rng: random.Random) -> str:
    alignment = rng.choice([0, 1, 8, 16, 33, 64, 4096, 2**20, 2**31 - 1, -32])
    c.metadata.append(text("general.alignment") + value_bytes(alignment))
    return f"alignment {alignment}"


def _data(c: GgufContents, rng: random.Random) -> str:
    name, info = rng.choice(c.infos)
    size = len(info.data)
    flipped = bytearray(info.data)
    at = rng.randrange(size)
    flipped[at] ^= 1 << rng.randrange(8)
    fills = [bytes(size), b"\xff" * size, b"\x7f" * size, rng.randbytes(size)]
    info.data = rng.choice([bytes(flipped), bytes(flipped), *fills])
    return f"{name}: byte {at} or all, {info.data[:4]!r}"


def _config(c: GgufContents, rng: random.Random) -> str:
    return change_leaf(c.config, rng)


def _written(c: GgufContents, rng: random.Random, folder: Path, kind: str) -> str:
    """Change the file itself."""
    path = folder / FILE
    raw = bytearray(path.read_bytes())
    n_header = len(c.header())
    if kind == "header":
        at = rng.choice([rng.randrange(24), rng.randrange(n_header)])
        raw[at] = rng.choice([raw[at] ^ (1 << rng.randrange(8)), rng.randrange(256)])
        path.write_bytes(raw)
        return f"header byte {at} now {raw[at]}"
    cut = rng.choice([0, 3, 4, 8, 23, rng.randrange(n_header), rng.randrange(len(raw))])
    path.write_bytes(rng.choice([raw[:cut], raw[:-1], raw + bytes(1), raw + raw[: cut + 1]]))
    return f"cut at {cut}, or longer"


def mutate_gguf(contents: GgufContents, kind: str, rng: random.Random, folder: Path) -> str:
    """Write contents with one change into a folder; say which."""
    mutation, _ = GGUF_KINDS[kind]
    said = "" if mutation is None else mutation(contents, rng)
    contents.write(folder)
    return said or _written(contents, rng, folder, kind)


GGUF_KINDS: dict[str, tuple[Mutation | None, Change]] = {
    "type": (_type, "values"),
    "extents": (_extents, "form"),
    "offset": (_offset, "form"),
    "swapped names": (_swap, "values"),
    "name": (_name, "values"),
    "without": (_without, "form"),
    "counts": (_counts, "form"),
    "metadata": (_metadata, "form"),
    "alignment": (_alignment, "form"),
    "data": (_data, "values"),
    "config": (_config, "settings"),
    "header": (None, "values"),
    "length": (None, "form"),
}
"""Mutations by name, and what may differ where the result is read"""
