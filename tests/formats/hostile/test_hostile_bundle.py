"""Damaged and forged bundles are refused by name, and left alone."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from moe_tool.errors import ArtifactVersionError, CorruptArtifactError, NotFoundError, StorageError
from moe_tool.formats.bundle_reader import BundleReader
from tests.formats import samples
from tests.formats.hostile.damage import (
    Case,
    append,
    content,
    cut,
    flip,
    folder_instead,
    in_file,
    json_changed,
    linked,
    pipe_instead,
    raw_header,
    removed,
    replaced,
)
from tests.formats.hostile.refusal import cases, require_refusal

MANIFEST, RECORDS, SKELETON = (
    "manifest.json",
    "experts-00001.safetensors",
    "skeleton-00001.safetensors",
)
SECOND = "experts-00002.safetensors"
SEGMENT = 4096


def manifest(name, change: Callable, says, error=CorruptArtifactError):
    return Case(name=name, damage=in_file(MANIFEST, json_changed(change)), says=says, error=error)


def table(name, change: Callable, says):
    return manifest(name, lambda parsed: change(parsed["forms"][0]), says)


def record(name, says, **changed):
    return manifest(name, lambda parsed: parsed["forms"][0]["records"][0].update(changed), says)


def listed(case, says, **changed):
    return manifest(case, lambda parsed: parsed["files"][0].update(changed), says)


def shape(name, says, **changed):
    return manifest(name, lambda parsed: parsed["shape"].update(changed), says)


def file(name, path, damage, says):
    return Case(name=name, damage=in_file(path, damage), says=says)


def same_size(text: bytes):
    """Another header of the same length."""

    def damage(path: Path) -> None:
        length = int.from_bytes(path.read_bytes()[:8], "little")
        raw_header(text + b" " * (length - len(text)))(path)

    return damage


def swapped(folder: Path) -> None:
    (folder / RECORDS).rename(folder / "x")
    (folder / SECOND).rename(folder / RECORDS)
    (folder / "x").rename(folder / SECOND)


def two_experts_swapped(parsed) -> None:
    first, second = parsed["forms"][0]["records"][:2]
    first["expert"], second["expert"] = second["expert"], first["expert"]


def unfinished(folder: Path) -> None:
    (folder / MANIFEST).rename(folder / "journal.jsonl")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patched:
        samples.small_files(patched)
        samples.write_bundle(folder / "bundle", samples.make_checkpoint(folder / "model"))
    return folder / "bundle"


@pytest.fixture
def bundle(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "b" / "bundle"))


@cases(
    file("no manifest", MANIFEST, removed, "lacks its manifest.json"),
    file("manifest empty", MANIFEST, content(b""), MANIFEST),
    file("manifest cut", MANIFEST, cut(300), MANIFEST),
    file("manifest of brackets", MANIFEST, content(b"[" * 10**6), "nest"),
    file("manifest a folder", MANIFEST, folder_instead, MANIFEST),
    file("manifest a pipe", MANIFEST, pipe_instead, MANIFEST),
    file("manifest a link", MANIFEST, linked, "is a link"),
    file("key twice", MANIFEST, replaced(b'"kind"', b'"kind": "bundle", "kind"'), "twice"),
    Case(name="half-written", damage=unfinished, says="half-written"),
    manifest("next version", lambda p: p.update(format_version=4), "'4'", ArtifactVersionError),
    manifest("last version", lambda p: p.update(format_version=2), "'2'", ArtifactVersionError),
    manifest("another kind", lambda p: p.update(kind="buddies"), "a buddy map, not a bundle"),
    manifest("another record layout", lambda p: p.update(record_layout="x"), "record_layout"),
    manifest("no forms", lambda p: p.update(forms=[]), "0 records"),
    table("no records", lambda t: t.update(records=[]), "0 records"),
    table("a record missing", lambda t: t["records"].pop(), "5 records"),
    table("one expert twice", lambda t: t["records"][0].update(expert=0), "exactly once"),
    manifest("two experts swapped", two_experts_swapped, "does not hold layer.0.expert.0"),
    table("another record size", lambda t: t.update(record_size_bytes=4096), "4096 bytes"),
    table("absurd record size", lambda t: t.update(record_size_bytes=2**60), "record_size"),
    table("another width", lambda t: t["precision"].update(width_bits=5), "width_bits"),
    table("native for integers", lambda t: t.update(precision={"kind": "native"}), "record"),
    manifest("a file twice", lambda p: p["files"].append(p["files"][0]), "listed twice"),
    manifest(
        "lists itself",
        lambda p: p["files"].append({"name": MANIFEST, "size_bytes": 1, "sha256": "0" * 64}),
        "lists itself",
    ),
    manifest("a file too few", lambda p: p["files"].pop(), "config.json is not listed"),
    shape("a billion experts", "experts", experts=2**31),
    shape("a number of experts beyond 64 bits", "experts", experts=2**64),
    shape("a million layers", "experts", layers=list(range(10**5)), n_decoder_layers=10**5),
    shape("no experts", "experts", experts=0),
    shape("no layers", "experts", layers=[]),
    shape("more per token than experts", "top_k", top_k=4),
    shape("no tensors", "tensors", expert_tensors=[]),
    shape("an absurd tensor", "record", expert_tensors=[{"name": "x", "shape": [2**31] * 9}]),
    record("parent folder", "records.0.file", file="../" + RECORDS),
    record("absolute name", "records.0.file", file="/etc/passwd"),
    record("hidden file", "records.0.file", file=".x"),
    record("name of 1000 letters", "records.0.file", file="x" * 1000),
    record("unlisted file", "unlisted", file="experts-00009.safetensors"),
    record("unaligned", "not aligned", offset=4097),
    record("beyond the end", "ends beyond", offset=2**40),
    record("over its neighbour", "overlap", offset=2 * SEGMENT),
    record("over the header", "does not hold", offset=0),
    record("negative offset", "offset", offset=-4096),
    record("hash no hash", "xxh3", xxh3="x" * 16),
    listed("file in a parent folder", "files.0.name", name="../x"),
    listed("size one more", RECORDS, size_bytes=10**6),
    listed("negative size", "size_bytes", size_bytes=-1),
    file("records missing", RECORDS, removed, RECORDS),
    file("records empty", RECORDS, content(b""), RECORDS),
    file("records cut", RECORDS, cut(-1), RECORDS),
    file("records longer", RECORDS, append(b"\0" * 4096), RECORDS),
    file("records a folder", RECORDS, folder_instead, RECORDS),
    file("records a link", RECORDS, linked, "is a link"),
    file("records a pipe", RECORDS, pipe_instead, RECORDS),
    file("absurd header length", RECORDS, flip(7), RECORDS),
    file("header of another file", RECORDS, same_size(b"{}"), RECORDS),
    Case(name="files swapped", damage=swapped, says=RECORDS),
    file("skeleton missing", SKELETON, removed, SKELETON),
    file("skeleton a link", SKELETON, linked, "is a link"),
    file("skeleton's length damaged", SKELETON, flip(1), SKELETON),
    file("skeleton's header damaged", SKELETON, same_size(b"{"), SKELETON),
    file("config missing", "config.json", removed, "config.json"),
    Case(
        name="a tokenizer slipped in",
        damage=lambda folder: content(b"{}")(folder / "tokenizer.json"),
        says="tokenizer.json is not listed",
    ),
    Case(name="nothing there", damage=shutil.rmtree, says="does not exist", error=NotFoundError),
    Case(
        name="only the half-written one",
        damage=lambda folder: folder.rename(folder.with_name("bundle.part")),
        says="half-written",
    ),
    Case(
        name="a file of that name",
        damage=lambda folder: (shutil.rmtree(folder), folder.write_text("x"))[0],
        says="is a text file, not a bundle",
    ),
)
def test_a_damaged_bundle(bundle: Path, case: Case) -> None:
    case.damage(bundle)
    require_refusal(case, bundle.parent, lambda: BundleReader.open(bundle))


def read_records(folder: Path, *, verify: bool = False) -> None:
    with BundleReader.open(folder) as reader:
        if verify:
            reader.verify_all()
        out = torch.empty(reader.forms[0].record_size_bytes, dtype=torch.uint8)
        for layer, expert in samples.ORDER:
            reader.read_record_into(layer, expert, out, form=0)


def with_scale(value: float, *, rehash: bool) -> Callable[[Path], None]:
    """Put a number into the first scale of layer 2 expert 0, the hashes right if asked for."""

    def damage(folder: Path) -> None:
        with BundleReader.open(folder) as reader:
            entry = reader.record_entry(2, 0, form=0)
            (scales,) = [
                s for s in reader.forms[0].form.layout.segments if s.name == "down_proj.scales"
            ]
            size = reader.forms[0].record_size_bytes
        path = folder / entry.file
        data = bytearray(path.read_bytes())
        start = entry.offset + scales.offset
        data[start : start + 2] = np.float16(value).tobytes()
        path.write_bytes(data)
        if not rehash:
            return
        parsed = json.loads((folder / MANIFEST).read_bytes())
        del parsed["sha256"]
        digest = xxhash.xxh3_64_hexdigest(bytes(data[entry.offset : entry.offset + size]))
        for found in parsed["forms"][0]["records"]:
            if (found["layer"], found["expert"]) == (2, 0):
                found["xxh3"] = digest
        for found in parsed["files"]:
            if found["name"] == entry.file:
                found["sha256"] = hashlib.sha256(data).hexdigest()
        (folder / MANIFEST).write_text(json.dumps(parsed))

    return damage


WHERE = "layer 2 expert 0 in"


@pytest.mark.parametrize("verify", [False, True], ids=["read", "verified"])
@cases(
    Case(name="NaN scale", damage=with_scale(float("nan"), rehash=False), says=WHERE),
    Case(name="NaN scale, right hash", damage=with_scale(float("nan"), rehash=True), says=WHERE),
    Case(name="infinite scale, right hash", damage=with_scale(-np.inf, rehash=True), says=WHERE),
    Case(name="another scale", damage=with_scale(3.0, rehash=False), says=WHERE),
    file("first bit of a record", RECORDS, flip(4096), "layer 0 expert 1 in"),
    file("last bit of a record", RECORDS, flip(-1), "layer 0 expert 0 in"),
    file("a bit in the padding", RECORDS, flip(4096 + 4095), "layer 0 expert 1 in"),
    record("stale hash", "layer 0 expert 1 in", xxh3="0" * 16),
)
def test_a_damaged_record(bundle: Path, case: Case, verify: bool) -> None:
    case.damage(bundle)
    require_refusal(case, bundle.parent, lambda: read_records(bundle, verify=verify))


@cases(
    file("a bit of a skeleton tensor", SKELETON, flip(-1), SKELETON),
    listed("stale hash of a file", RECORDS, sha256="0" * 64),
)
def test_what_only_the_full_check_finds(bundle: Path, case: Case) -> None:
    case.damage(bundle)
    read_records(bundle)
    require_refusal(case, bundle.parent, lambda: read_records(bundle, verify=True))


@cases(file("same size, other text", "config.json", replaced(b"{}", b"[]"), "config.json"))
def test_a_changed_config_is_found_at_open(bundle: Path, case: Case) -> None:
    case.damage(bundle)
    require_refusal(case, bundle.parent, lambda: read_records(bundle))


@cases(file("a bit of a skeleton tensor", SKELETON, flip(-1), SKELETON))
def test_a_changed_skeleton_tensor_is_found_when_it_is_read(bundle: Path, case: Case) -> None:
    def load() -> None:
        with BundleReader.open(bundle) as reader, reader.open_skeleton() as skeleton:
            for name in skeleton.tensors:
                skeleton.read(name)

    load()
    case.damage(bundle)
    require_refusal(case, bundle.parent, load)


def test_a_whole_bundle_passes_the_full_check(bundle: Path) -> None:
    before = samples.tree_hash(bundle)
    read_records(bundle, verify=True)
    (bundle / "notes.md").write_text("a README does no harm")
    (bundle / "notes.md").unlink()
    assert samples.tree_hash(bundle) == before


def test_a_bundle_opens_from_inside(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bundle)
    read_records(Path("."))


def test_a_file_that_shrinks_after_opening(bundle: Path) -> None:
    with BundleReader.open(bundle) as reader:
        cut(5000)(bundle / RECORDS)
        out = torch.empty(reader.forms[0].record_size_bytes, dtype=torch.uint8)
        with pytest.raises(StorageError, match="layer 0 expert 1 .* ended after") as error:
            reader.read_record_into(0, 1, out, form=0)
    assert error.value.exit_code == 3


def test_a_disk_that_does_not_answer(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    with BundleReader.open(bundle) as reader:
        monkeypatch.setattr(os, "preadv", fail)
        out = torch.empty(reader.forms[0].record_size_bytes, dtype=torch.uint8)
        with pytest.raises(StorageError, match="layer 0 expert 1 .*Input/output error"):
            reader.read_record_into(0, 1, out, form=0)
