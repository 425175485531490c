"""GGUF headers: files of the format's own library are read, and damaged ones refused."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from moe_tool.errors import MoeToolError, UnsupportedModelError
from moe_tool.formats.gguf_header import GgufTensor, read_gguf
from tests.gguf_file import GgufData, gguf_bytes, text, value_bytes

ONE = GgufData(kind="F32", data=np.arange(12, dtype=np.float32).reshape(3, 4))
TWO = GgufData(kind="Q8_0", data=np.zeros((2, 34), dtype=np.uint8))
METADATA = {"general.architecture": "llama", "tokens": ["a", "bé"], "scores": [1.0, 2.0], "x": True}


def written(folder: Path, data: bytes) -> Path:
    path = folder / "m.gguf"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("alignment", [8, 32, 64])
def test_tensors_and_metadata_are_found(alignment: int, tmp_path: Path) -> None:
    metadata = METADATA | {"general.alignment": alignment}
    data = gguf_bytes(metadata, {"one": ONE, "two": TWO}, alignment=alignment)
    header = read_gguf(written(tmp_path, data))
    assert header.metadata == metadata | {"tokens": None, "scores": None}
    one, two = header.tensors
    assert (one.name, one.kind, one.shape, one.size_bytes) == ("one", "F32", (3, 4), 48)
    assert (two.name, two.kind, two.shape, two.size_bytes) == ("two", "Q8_0", (2, 32), 68)
    assert data[one.offset : one.offset + 48] == ONE.data.tobytes()
    assert data[two.offset : two.offset + 68] == TWO.data.tobytes()


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen3moe")
    writer.add_token_list(["a", "b"])
    writer.add_token_scores([0.5, 1.0])
    writer.add_rope_freq_base(1e6)
    writer.add_tensor("one", ONE.data)
    writer.add_tensor("two", TWO.data, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_gguf(tmp_path / "m.gguf")
    theirs = gguf.GGUFReader(tmp_path / "m.gguf").tensors
    assert header.metadata["general.architecture"] == "qwen3moe"
    assert header.metadata["qwen3moe.rope.freq_base"] == 1e6
    assert list(header.tensors) == [
        GgufTensor(
            name=each.name,
            kind=each.tensor_type.name,
            shape=tuple(int(n) for n in reversed(each.shape)),
            offset=int(each.data_offset),
            size_bytes=int(each.n_bytes),
        )
        for each in theirs
    ]


def entry(name: str, shape: list[int], kind: int, offset: int) -> bytes:
    head = text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return head + struct.pack("<IQ", kind, offset)


def file_of(
    entries: list[bytes], *, metadata: bytes = b"", n_keys: int = 0, size: int = 64
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(entries), n_keys) + metadata + b"".join(entries)
    return head + bytes(-len(head) % 32) + bytes(size)


def key(name: str, value: object) -> bytes:
    return text(name) + value_bytes(value)


HUGE = 2**63
DAMAGED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "is no GGUF file"),
    "letters": (b"GGUX" + bytes(100), "is no GGUF file"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    "a page": (b"<!DOCTYPE html><html>", "is a web page"),
    "magic only": (b"GGUF", "is truncated"),
    "first version": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1, which is not read"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "which is not read"),
    "keys without end": (b"GGUF" + struct.pack("<IQQ", 3, 0, HUGE), "is truncated"),
    "tensors without end": (b"GGUF" + struct.pack("<IQQ", 3, HUGE, 0), "is truncated"),
    "a long text": (file_of([], metadata=struct.pack("<Q", HUGE), n_keys=1), "has a text of"),
    "a text beyond the file": (
        file_of([], metadata=struct.pack("<Q", 2**20), n_keys=1),
        "is truncated",
    ),
    "a key twice": (file_of([], metadata=2 * key("a", 1), n_keys=2), "has the key 'a' twice"),
    "an unknown type": (
        file_of([], metadata=text("a") + struct.pack("<I", 13), n_keys=1),
        "unknown type 13",
    ),
    "an array in an array": (
        file_of([], metadata=text("a") + struct.pack("<IIQ", 9, 9, 1), n_keys=1),
        "unknown type 9",
    ),
    "an array beyond the file": (
        file_of([], metadata=text("a") + struct.pack("<IIQ", 9, 10, HUGE), n_keys=1),
        "is truncated",
    ),
    "texts beyond the file": (
        file_of([], metadata=text("a") + struct.pack("<IIQ", 9, 8, HUGE), n_keys=1),
        "is truncated",
    ),
    "no alignment": (
        file_of([], metadata=key("general.alignment", 0), n_keys=1),
        "aligns tensors to '0'",
    ),
    "an alignment in words": (
        file_of([], metadata=key("general.alignment", "32"), n_keys=1),
        "aligns tensors to '32'",
    ),
    "no extents": (file_of([entry("a", [], 0, 0)]), "has 0 extents"),
    "five extents": (file_of([entry("a", [1] * 5, 0, 0)]), "has 5 extents"),
    "an empty tensor": (file_of([entry("a", [0, 4], 0, 0)]), r"has shape \[4, 0\]"),
    "an endless tensor": (file_of([entry("a", [2**40] * 3, 0, 0)]), "has shape"),
    "half a block": (file_of([entry("a", [16], 8, 0)]), r"has shape \[16\] for Q8_0"),
    "another type": (file_of([entry("a", [256], 16, 0)]), "GGUF type 16, which is not read"),
    "a name twice": (file_of([entry("a", [8], 0, 0)] * 2), "two tensors of one name"),
    "an overlap": (
        file_of([entry("a", [8], 0, 0), entry("b", [8], 0, 0)]),
        "behind a hole or in another",
    ),
    "a hole": (file_of([entry("a", [8], 0, 32)]), "behind a hole"),
    "an offset beyond": (file_of([entry("a", [8], 0, HUGE)]), "behind a hole"),
    "too few bytes": (file_of([entry("a", [32], 0, 0)]), "is truncated: tensor 'a' ends"),
    "too many bytes": (file_of([entry("a", [8], 0, 0)]), "is longer than its"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_refused(case: str, tmp_path: Path) -> None:
    data, words = DAMAGED[case]
    with pytest.raises(MoeToolError, match=words) as caught:
        read_gguf(written(tmp_path, data))
    assert caught.value.exit_code == 3 and caught.value.hint
    assert "\n" not in caught.value.message


def test_a_shorter_file_is_refused(tmp_path: Path) -> None:
    data = gguf_bytes(METADATA, {"one": ONE, "two": TWO})
    for n_bytes in range(0, len(data) - 28, 5):  # what follows fills up to the alignment
        with pytest.raises(MoeToolError):
            read_gguf(written(tmp_path, data[:n_bytes]))


def test_a_changed_byte_is_read_or_refused(tmp_path: Path) -> None:
    data = bytearray(gguf_bytes(METADATA, {"one": ONE, "two": TWO}))
    refused = 0
    for at in range(len(data) - 128):
        changed = data[at] ^ (0x80 if at % 2 else 1)
        damaged = bytes(data[:at]) + bytes([changed]) + bytes(data[at + 1 :])
        try:
            read_gguf(written(tmp_path, damaged))
        except MoeToolError as error:
            refused += 1
            assert isinstance(error, UnsupportedModelError) or str(tmp_path) in error.message
    assert refused > 100
