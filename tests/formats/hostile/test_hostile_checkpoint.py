"""Damaged checkpoints are refused by name, and left alone."""

import os
from pathlib import Path

import pytest

from moe_tool.errors import CorruptArtifactError, NotFoundError, StorageError, UnsupportedModelError
from moe_tool.formats.safetensors_index import Checkpoint
from tests.formats import samples
from tests.formats.hostile.damage import (
    Case,
    append,
    content,
    cut,
    flip,
    folder_instead,
    header_changed,
    in_file,
    json_changed,
    pipe_instead,
    raw_header,
    removed,
)
from tests.formats.hostile.refusal import cases, require_refusal

ONE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
ENTRY = b'{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}'


def header(name, change, says):
    return Case(name=name, damage=header_changed(change), says=says)


def entry(name, says, **changed):
    return header(name, lambda parsed: parsed["embed"].update(changed), says)


def renamed(parsed, old, new):
    parsed[new] = parsed.pop(old)


@cases(
    Case(name="empty file", damage=content(b""), says="0 bytes"),
    Case(name="cut inside the length", damage=cut(5), says="5 bytes"),
    Case(name="cut behind the length", damage=cut(8), says="truncated"),
    Case(name="cut inside the header", damage=cut(30), says="truncated"),
    Case(name="cut inside the data", damage=cut(-1), says="truncated: wanted"),
    Case(name="bytes behind the data", damage=append(b"x"), says="longer"),
    Case(name="absurd header length", damage=content(b"\xff" * 8 + b"{}"), says="its header has"),
    Case(name="header of zero bytes", damage=content(b"\0" * 8), says="damaged"),
    Case(name="header no JSON", damage=flip(8), says="damaged"),
    Case(name="header a list", damage=raw_header(b"[1]"), says="not an object"),
    Case(name="header in UTF-16", damage=raw_header("{}".encode("utf-16")), says="UTF-8"),
    Case(name="deep nesting", damage=raw_header(b"[" * 1_000_000), says="nest"),
    Case(
        name="key twice",
        damage=raw_header(b'{"embed":' + ENTRY + b',"embed":' + ENTRY + b"}"),
        says="'embed' occurs twice",
    ),
    Case(name="NaN", damage=raw_header(b'{"embed":NaN}'), says="NaN"),
    Case(name="huge number", damage=raw_header(b'{"embed":' + b"9" * 5000 + b"}"), says="digits"),
    header("metadata no strings", lambda p: p.update(__metadata__={"format": 1}), "metadata"),
    header("another key", lambda p: p["embed"].update(extra=1), "'embed'"),
    header("entry a number", lambda p: p.update(embed=3), "'embed'"),
    header("a tensor missing", lambda p: p.pop("embed"), "hole"),
    header(
        "name of two lines",
        lambda p: renamed(p, "embed", "a\n\x1b[31mb") or p.update({"a\n\x1b[31mb": {}}),
        "x1b",
    ),
    header("name of a million", lambda p: p.update({"x" * 10**6: {}}), "xxx"),
    entry("unknown dtype", "'F33'", dtype="F33"),
    entry("wrong dtype", "needs 12 bytes, has 24", dtype="F16"),
    entry("dtype a list", "unknown dtype", dtype=["F32"]),
    entry("negative size", "shape", shape=[-2, -3]),
    entry("shape that overflows", "shape", shape=[2**63, 2]),
    entry("shape that wraps to the right size", "needs", shape=[2**33, 2**33, 2**33]),
    entry("size true", "shape", shape=[True, 6]),
    entry("size a fraction", "shape", shape=[2.0, 3]),
    entry("a hundred dimensions", "shape", shape=[1] * 100),
    entry("offsets backwards", "range", data_offsets=[24, 0]),
    entry("offsets beyond the file", "needs 24 bytes, has", data_offsets=[0, 2**50]),
    entry("three offsets", "range", data_offsets=[0, 24, 24]),
    entry("hole", "hole", data_offsets=[4, 28]),
    header("overlap", lambda p: p["norm"].update(data_offsets=[20, 28]), "overlaps"),
    Case(name="folder", damage=folder_instead, says="not a file"),
    Case(name="pipe", damage=pipe_instead, says="not a file"),
)
def test_a_damaged_file(tmp_path: Path, case: Case) -> None:
    folder = samples.make_checkpoint(tmp_path / "model")
    in_file(ONE, case.damage)(folder)
    require_refusal(case, folder, lambda: Checkpoint.open_folder(folder))


def mapped(name, says, **changed):
    damage = json_changed(lambda parsed: parsed["weight_map"].update(changed))
    return Case(name=name, damage=in_file(INDEX, damage), says=says)


@cases(
    Case(name="shard missing", damage=in_file(SECOND, removed), says=SECOND),
    Case(name="shard a folder", damage=in_file(SECOND, folder_instead), says=SECOND),
    Case(name="shard cut", damage=in_file(SECOND, cut(-4)), says=SECOND),
    Case(name="shard empty", damage=in_file(SECOND, content(b"")), says=SECOND),
    mapped("parent folder", "'../model.safetensors'", b="../model.safetensors"),
    mapped("absolute name", "'/etc/passwd.safetensors'", b="/etc/passwd.safetensors"),
    mapped("name of a pickle", "'model.bin'", b="model.bin"),
    mapped("name a number", "'3'", b=3),
    mapped("name with a null", "x00", b="a\0.safetensors"),
    Case(name="index empty", damage=in_file(INDEX, content(b"")), says=INDEX),
    Case(name="index cut", damage=in_file(INDEX, cut(20)), says=INDEX),
    Case(name="index without map", damage=in_file(INDEX, content(b"{}")), says="weight_map"),
    Case(
        name="map empty", damage=in_file(INDEX, content(b'{"weight_map": {}}')), says="weight_map"
    ),
    Case(name="map a list", damage=in_file(INDEX, content(b'{"weight_map":[]}')), says=INDEX),
    Case(name="index a folder", damage=in_file(INDEX, folder_instead), says=INDEX),
    Case(
        name="index with a key twice",
        damage=in_file(INDEX, content(b'{"weight_map":{"a":"x","a":"y"}}')),
        says="twice",
    ),
)
def test_a_damaged_set_of_shards(tmp_path: Path, case: Case) -> None:
    folder = samples.make_sharded(tmp_path / "model")
    case.damage(folder)
    require_refusal(case, folder, lambda: Checkpoint.open_folder(folder))


@cases(
    Case(name="nothing there", damage=removed, says="neither", error=NotFoundError),
    Case(
        name="only a pickle",
        damage=lambda path: path.rename(path.with_name("pytorch_model.bin")),
        says="pickle",
        error=UnsupportedModelError,
    ),
    Case(
        name="a link to nothing",
        damage=lambda path: (path.unlink(), path.symlink_to("gone"))[0],
        says="is a link to 'gone', which is not there",
        error=NotFoundError,
    ),
    Case(
        name="a link to itself",
        damage=lambda path: (path.unlink(), path.symlink_to(path.name))[0],
        says=f"{ONE} is a link that leads back to itself",
        error=NotFoundError,
    ),
)
def test_what_is_not_there(tmp_path: Path, case: Case) -> None:
    folder = samples.make_checkpoint(tmp_path / "model")
    in_file(ONE, case.damage)(folder)
    require_refusal(case, folder, lambda: Checkpoint.open_folder(folder))


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = samples.make_checkpoint(tmp_path / "model")
    real = os.open

    def refuse(path, *arguments, **named):
        if str(path).endswith(ONE):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        with pytest.raises(StorageError, match="Permission denied") as error:
            Checkpoint.open_folder(folder)
    assert error.value.exit_code == 3 and ONE in error.value.message


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    folder = samples.make_checkpoint(tmp_path / "model")
    with Checkpoint.open_folder(folder) as checkpoint:
        cut(-10)(folder / ONE)
        last = max(checkpoint.tensors.values(), key=lambda info: info.offset)
        with pytest.raises(CorruptArtifactError, match="ended while"):
            checkpoint.read(last.name)
