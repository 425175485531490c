"""Seeded wrong changes of a checkpoint: header, index, config, settings, bytes, names and sizes."""

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

WEIGHTS, CONFIG = "model.safetensors", "config.json"
INDEX, SHARD = "model.safetensors.index.json", "model-00001-of-00002.safetensors"
Change = Literal["form", "values", "settings"]
"""Nothing that a weight depends on; the bytes of weights; numbers of the model or the codes"""
_SIZES = {
    1: ("U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "BOOL"),
    2: ("F16", "BF16", "I16", "U16"),
    4: ("F32", "I32", "U32"),
    8: ("F64", "I64", "U64"),
}
_BYTES = {name: size for size, names in _SIZES.items() for name in names}
_SUFFIXES = (
    ".weight", "_scale", ".scales", "_blocks", ".SCB", ".qweight", ".biases", "_packed", ".scale",
    ".weight_scale_inv", ".absmax", ".quant_state.bitsandbytes__nf4", ".g_idx", ".weight_shape",
)  # fmt: skip
_METHODS = (
    "fp8", "mxfp4", "compressed-tensors", "modelopt", "awq", "gptq", "bitsandbytes", "mlx", "FP8",
    "aqlm",
)  # fmt: skip
_ABSURD: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 7, 16, 64, 2**31, 2**40, 2**62, 10**30, 0.5, -0.0, 1e308, float("nan"),
    float("inf"), True, False, None, "", "x", "4", "\x00", "re:(", [], [0], [[]], {}, {"a": 1},
)  # fmt: skip


@dataclass(slots=True, kw_only=True)
class Contents:
    """Checkpoint taken apart, to be put together again with one thing changed."""

    config: dict[str, Any]
    entries: dict[str, dict[str, Any]]
    """Header of each tensor, without offsets"""
    data: dict[str, bytes]

    @classmethod
    def read(cls, folder: Path) -> "Contents":
        """Take a checkpoint of one file apart."""
        raw = (folder / WEIGHTS).read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        header.pop("__metadata__", None)
        data, entries = {}, {}
        for name, entry in header.items():
            first, stop = entry.pop("data_offsets")
            data[name], entries[name] = raw[start + first : start + stop], entry
        config = json.loads((folder / CONFIG).read_text())
        return cls(config=config, entries=entries, data=data)

    def write(self, folder: Path) -> None:
        """Write config.json and the file of weights."""
        (folder / CONFIG).write_text(json.dumps(self.config))
        (folder / WEIGHTS).write_bytes(_file(self.entries, self.data))

    def any_tensor(self, rng: random.Random) -> str:
        """Return a tensor's name, as often a small one as a large one."""
        return rng.choice(sorted(self.entries))

    @property
    def settings(self) -> dict[str, Any]:
        """Quantization settings inside the configuration."""
        key = "quantization" if "quantization" in self.config else "quantization_config"
        found: dict[str, Any] = self.config[key]
        return found


Mutation = Callable[[Contents, random.Random, Path], str]
"""Changes the contents, or the files that were written from them; returns what was done"""


def mutate(contents: Contents, kind: str, rng: random.Random, folder: Path) -> str:
    """Write contents with one change into a folder; say which."""
    mutation, _ = KINDS[kind]
    if mutation in _OF_FILES:
        contents.write(folder)
        return mutation(contents, rng, folder)
    said = mutation(contents, rng, folder)
    contents.write(folder)
    return said


def _file(entries: dict[str, dict[str, Any]], data: dict[str, bytes]) -> bytes:
    position, header = 0, {}
    for name, entry in entries.items():
        header[name] = {**entry, "data_offsets": [position, position + len(data[name])]}
        position += len(data[name])
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(data[name] for name in entries)


def _dtype(c: Contents, rng: random.Random, _: Path) -> str:
    name = c.any_tensor(rng)
    dtype = c.entries[name]["dtype"]
    c.entries[name]["dtype"] = rng.choice([x for x in _SIZES[_BYTES[dtype]] if x != dtype])
    return f"{name}: {dtype} as {c.entries[name]['dtype']}"


def _wider(c: Contents, rng: random.Random, _: Path) -> str:
    name = c.any_tensor(rng)
    size = _BYTES[c.entries[name]["dtype"]]
    others = [dtype for dtype, other in _BYTES.items() if other != size]
    dtype = c.entries[name]["dtype"] = rng.choice([*others, "F4", "", "C64", 7])
    return f"{name}: as {dtype}"


def _shape(c: Contents, rng: random.Random, _: Path) -> str:
    name = c.any_tensor(rng)
    shape = c.entries[name]["shape"]
    size = math.prod(shape)
    two = [2 * shape[0], *shape[1:-1], shape[-1] // 2] if len(shape) > 1 else [1, size]
    options = [shape[::-1], [size], [1, *shape], [*shape, 1], [*shape[:-2], -1], two]
    c.entries[name]["shape"] = rng.choice(options)
    return f"{name}: {shape} as {c.entries[name]['shape']}"


def _absurd_shape(c: Contents, rng: random.Random, _: Path) -> str:
    name = c.any_tensor(rng)
    shape = list(c.entries[name]["shape"]) or [1]
    shape[rng.randrange(len(shape))] = rng.choice([2**31, 2**40, 2**55, 2**62, -1, 0.5, "8", None])
    c.entries[name]["shape"] = shape
    return f"{name}: shape {shape}"


def _empty(c: Contents, rng: random.Random, _: Path) -> str:
    """A tensor of no bytes with an absurd extent."""
    name = c.any_tensor(rng)
    shape = list(c.entries[name]["shape"]) or [1]
    extents = [rng.choice([size, 2**40, 2**55]) for size in shape]
    extents[rng.randrange(len(shape))] = 0
    c.entries[name]["shape"], c.data[name] = extents, b""
    return f"{name}: empty {extents}"


def _cut_tensor(c: Contents, rng: random.Random, _: Path) -> str:
    """A tensor that is smaller or larger, with a header that says so."""
    name = c.any_tensor(rng)
    shape = c.entries[name]["shape"]
    if not shape or shape[0] == 0:
        return "nothing"
    row = len(c.data[name]) // shape[0]
    data, is_longer = c.data[name], rng.random() < 0.5
    c.data[name] = data + bytes(row) if is_longer else data[row:]
    c.entries[name]["shape"] = [shape[0] + (1 if is_longer else -1), *shape[1:]]
    return f"{name}: {shape} as {c.entries[name]['shape']}"


def _rename(c: Contents, rng: random.Random, _: Path) -> str:
    name = c.any_tensor(rng)
    stem, _dot, last = name.rpartition(".")
    new = rng.choice([
        name + rng.choice(_SUFFIXES), stem or "x", f"{stem}{rng.choice(_SUFFIXES)}", f"x.{name}",
        "", "\u2028\n", "a" * 70_000, f"{stem}..{last}", name.replace("0", "99"), name.upper(),
    ])  # fmt: skip
    if new in c.entries:
        return "nothing"
    c.entries = {new if key == name else key: entry for key, entry in c.entries.items()}
    c.data[new] = c.data[name]
    return f"{name}: now {new[:80]!r}"


def _swap(c: Contents, rng: random.Random, _: Path) -> str:
    """Two tensors under each other's names."""
    a, b = rng.sample(sorted(c.entries), 2)
    c.entries[a], c.entries[b] = c.entries[b], c.entries[a]
    c.data[a], c.data[b] = c.data[b], c.data[a]
    return f"{a} and {b} swapped"


def _remove(c: Contents, rng: random.Random, _: Path) -> str:
    name = c.any_tensor(rng)
    del c.entries[name]
    return f"without {name}"


def _add(c: Contents, rng: random.Random, _: Path) -> str:
    name = c.any_tensor(rng)
    stem = rng.choice([name, name.rpartition(".")[0], "extra"])
    new = stem + rng.choice(_SUFFIXES)
    if new in c.entries:
        return "nothing"
    dtype = rng.choice(sorted(_BYTES))
    shape = rng.choice([[], [1], [4, 16], c.entries[name]["shape"]])
    c.entries[new] = {"dtype": dtype, "shape": shape}
    c.data[new] = bytes(math.prod(shape) * _BYTES[dtype])
    return f"added {new} {dtype} {shape}"


def _byte(c: Contents, rng: random.Random, _: Path) -> str:
    name = c.any_tensor(rng)
    raw = bytearray(c.data[name])
    at = rng.randrange(len(raw))
    raw[at] ^= 1 << rng.randrange(8)
    c.data[name] = bytes(raw)
    return f"{name}: bit of byte {at}"


def _fill(c: Contents, rng: random.Random, _: Path) -> str:
    name = c.any_tensor(rng)
    size = len(c.data[name])
    c.data[name] = rng.choice([bytes(size), b"\xff" * size, b"\x7f" * size, rng.randbytes(size)])
    return f"{name}: all {c.data[name][:4]!r}"


def _config(c: Contents, rng: random.Random, _: Path) -> str:
    return change_leaf(c.config, rng)


def _settings(c: Contents, rng: random.Random, _: Path) -> str:
    return change_leaf(c.settings, rng)


def change_leaf(holder: dict[str, Any], rng: random.Random) -> str:
    """Change, remove or add one value somewhere below."""
    path = ""
    while True:
        key = rng.choice(sorted(holder))
        path += f"/{key}"
        below = holder[key]
        if isinstance(below, dict) and below and rng.random() < 0.8:
            holder = below
            continue
        if rng.random() < 0.2:
            del holder[key]
            return f"{path} removed"
        is_number = isinstance(below, int) and not isinstance(below, bool)
        near = [below * 2, below // 2, below + 1, -below, float(below)] if is_number else []
        holder[key] = rng.choice([*_ABSURD, *near])
        return f"{path}: {below!r} now {holder[key]!r}"


def _other_settings(c: Contents, rng: random.Random, folder: Path) -> str:
    key = "quantization" if "quantization" in c.config else "quantization_config"
    settings = c.config.pop(key)
    where = rng.choice(["none", "text_config", "compression_config", "method", "file", "string"])
    if where == "method":
        c.config[key] = {**settings, "quant_method": rng.choice(_METHODS)}
        return f"quant_method {c.config[key]['quant_method']}"
    if where == "text_config":
        c.config["text_config"] = {key: settings}
    elif where == "compression_config":
        c.config[where] = settings
    elif where == "string":
        c.config[key] = rng.choice(["fp8", 8, [], [settings]])
    elif where == "file":
        name = rng.choice(["hf_quant_config.json", "quantize_config.json"])
        algorithm = {"quantization": {"quant_algo": "NVFP4"}}
        inner = rng.choice([settings, {"quantization": settings}, algorithm])
        (folder / name).write_text(rng.choice([json.dumps(inner), "", "[]", "{"]))
        return f"settings in {name}: {str(inner)[:60]}"
    return f"settings: {where}"


def _header_bytes(_c: Contents, rng: random.Random, folder: Path) -> str:
    path = folder / WEIGHTS
    raw = bytearray(path.read_bytes())
    length = 8 + int.from_bytes(raw[:8], "little")
    at = rng.choice([rng.randrange(8), rng.randrange(length)])
    raw[at] = rng.choice([raw[at] ^ (1 << rng.randrange(8)), rng.randrange(256)])
    path.write_bytes(raw)
    return f"header byte {at} now {raw[at]}"


def _file_size(_c: Contents, rng: random.Random, folder: Path) -> str:
    path = folder / rng.choice([WEIGHTS, CONFIG])
    raw = path.read_bytes()
    cut = rng.choice([0, 1, 7, 8, 9, rng.randrange(len(raw)), len(raw) - 1])
    path.write_bytes(rng.choice([raw[:cut], raw + bytes(1), raw + raw[: cut + 1]]))
    return f"{path.name}: cut at {cut}, or longer"


def _index(c: Contents, rng: random.Random, folder: Path) -> str:
    """Two shards and an index that is wrong."""
    (folder / WEIGHTS).unlink()
    names = sorted(c.entries)
    half = len(names) // 2
    shards = [SHARD, SHARD.replace("1-of", "2-of")]
    weight_map: dict[str, Any] = {}
    for shard, part in zip(shards, (names[:half], names[half:]), strict=True):
        (folder / shard).write_bytes(_file({name: c.entries[name] for name in part}, c.data))
        weight_map |= dict.fromkeys(part, shard)
    name = rng.choice(names)
    wrong: list[Any] = ["", "../x", "/etc/passwd", "config.json", None, 3, *shards, "x" * 300]
    how = rng.choice(["place", "absent", "extra", "map", "text", "shard", "right"])
    total = {"total_size": rng.choice([0, -1, 2**70])}
    document: dict[str, Any] = {"metadata": total, "weight_map": weight_map}
    if how == "place":
        weight_map[name] = rng.choice(wrong)
    elif how == "absent":
        del weight_map[name]
    elif how == "extra":
        weight_map[f"{name}{rng.choice(_SUFFIXES)}"] = shards[0]
    elif how == "map":
        document["weight_map"] = rng.choice([None, [], {}, "x", 7])
    elif how == "shard":
        (folder / rng.choice(shards)).unlink()
    text = json.dumps(document)
    cut = rng.randrange(len(text))
    (folder / INDEX).write_text(text[:cut] if how == "text" else text)
    return f"index: {how} {name} {weight_map.get(name)!r:.60}"


KINDS: dict[str, tuple[Mutation, Change]] = {
    "dtype": (_dtype, "values"),
    "dtype of another size": (_wider, "form"),
    "shape": (_shape, "form"),
    "absurd shape": (_absurd_shape, "form"),
    "empty": (_empty, "form"),
    "size": (_cut_tensor, "form"),
    "name": (_rename, "form"),
    "swapped names": (_swap, "values"),
    "without": (_remove, "form"),
    "more": (_add, "form"),
    "bit": (_byte, "values"),
    "bytes": (_fill, "values"),
    "config": (_config, "settings"),
    "settings": (_settings, "settings"),
    "place of settings": (_other_settings, "settings"),
    "header": (_header_bytes, "values"),
    "length": (_file_size, "form"),
    "index": (_index, "form"),
}
"""Mutations by name, and what may differ where the result is read"""
_OF_FILES = {_header_bytes, _file_size, _index}
