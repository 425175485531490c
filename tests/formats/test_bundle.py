"""A bundle is whole or resumable, whenever its writer dies, and always the same bytes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from moe_tool.artifacts.bundle_manifest import BundleManifest
from moe_tool.errors import (
    CorruptArtifactError,
    DiskFullError,
    NotFoundError,
    UsageError,
    WrongModelError,
)
from moe_tool.formats import bundle_writer, record_plan
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.formats.json_artifact import read_json_artifact
from tests.formats.small_bundle import (
    IDENTITY,
    MADE_FROM,
    ORDER,
    SKELETON,
    encoded,
    expert_weights,
    folder_bytes,
    open_writer,
    write_bundle,
    write_rest,
)


def other(digit: str) -> dict[str, object]:
    return {"identity": IDENTITY.model_copy(update={"name": "other", "quick": digit * 64})}


@pytest.mark.parametrize("bits", ["native", "8", "4"])
def test_every_record_comes_back(tmp_path: Path, bits: str) -> None:
    folder = write_bundle(tmp_path / "bundle", bits=bits)
    writer = open_writer(tmp_path / "unused", bits=bits)
    with BundleReader.open(folder) as reader:
        out = torch.empty(reader.forms[0].record_size_bytes, dtype=torch.uint8)
        for layer, expert in ORDER:
            reader.read_record_into(layer, expert, out, form=0)
            assert torch.equal(out, encoded(writer, layer, expert))
        assert reader.expert_bytes == 8 * reader.forms[0].record_size_bytes
        reader.verify_all()


def test_the_safetensors_library_reads_every_file(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle", bits="native")
    with safe_open(folder / "experts-00001.safetensors", "pt") as file:
        assert len(list(file.keys())) == 8 * 3
        raw = file.get_tensor("layer.3.expert.2.down_proj")
    found = raw[: 72 * 5 * 2].view(torch.bfloat16).view(72, 5)
    assert torch.equal(found, expert_weights(3, 2)["down_proj"])
    skeleton = load_file(folder / "skeleton-00001.safetensors")
    assert skeleton.keys() == SKELETON.keys()
    assert all(torch.equal(skeleton[name], SKELETON[name]) for name in SKELETON)


def test_records_lie_aligned_in_the_order_asked_for(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle")
    manifest = read_json_artifact(folder / "manifest.json", BundleManifest)
    (table,) = manifest.forms
    assert [(r.layer, r.expert) for r in table.records] == ORDER
    offsets = [record.offset for record in table.records]
    size = table.record_size_bytes
    assert offsets == [offsets[0] + i * size for i in range(8)] and offsets[0] % 4096 == 0


def test_records_are_spread_over_files_that_are_not_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = open_writer(tmp_path / "unused").forms[0].layout.size_bytes
    monkeypatch.setattr(record_plan, "MAX_FILE_BYTES", 3 * size)
    monkeypatch.setattr(bundle_writer, "MAX_FILE_BYTES", 100)
    folder = write_bundle(tmp_path / "bundle")
    assert sorted(path.name for path in folder.glob("*.safetensors")) == [
        "experts-00001.safetensors",
        "experts-00002.safetensors",
        "experts-00003.safetensors",
        "skeleton-00001.safetensors",
        "skeleton-00002.safetensors",
    ]
    with BundleReader.open(folder) as reader:
        reader.verify_all()


@pytest.mark.parametrize("n_files", [1, 3])
@pytest.mark.parametrize("n_before", range(9))
def test_an_interrupted_bundle_becomes_the_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_before: int, n_files: int
) -> None:
    size = open_writer(tmp_path / "unused").forms[0].layout.size_bytes
    monkeypatch.setattr(record_plan, "MAX_FILE_BYTES", -(-8 // n_files) * size)
    whole = write_bundle(tmp_path / "whole")
    writer = open_writer(tmp_path / "resumed")
    for layer, expert in ORDER[:n_before]:
        writer.write_record(0, layer, expert, encoded(writer, layer, expert))
    writer.suspend()
    resumed = open_writer(tmp_path / "resumed")
    assert resumed.n_written == n_before
    assert list(resumed.to_write) == [(0, *key) for key in ORDER[n_before:]]
    write_rest(resumed)
    assert folder_bytes(tmp_path / "resumed") == folder_bytes(whole)


def test_an_empty_folder_takes_the_bundle_and_a_used_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert folder_bytes(write_bundle(tmp_path / "empty")) == folder_bytes(
        write_bundle(tmp_path / "whole")
    )
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    (tmp_path / "beside").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "beside")  # a rename cannot replace it
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for name in ("used", "link", "dangling"):
        with pytest.raises(UsageError, match=f"{name} exists and is not a bundle"):
            write_bundle(tmp_path / name)
        assert not (tmp_path / f"{name}.part").exists()
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("cut", [0, 1, 4096, 5000, -4097, -1])
def test_a_torn_end_of_the_records_is_written_again(tmp_path: Path, cut: int) -> None:
    whole = write_bundle(tmp_path / "whole")
    writer = open_writer(tmp_path / "torn")
    for layer, expert in ORDER[:5]:
        writer.write_record(0, layer, expert, encoded(writer, layer, expert))
    writer.suspend()
    file = tmp_path / "torn.part" / "experts-00001.safetensors"
    file.write_bytes(file.read_bytes()[: cut or None][: None if cut <= 0 else cut])
    write_rest(open_writer(tmp_path / "torn"))
    assert folder_bytes(tmp_path / "torn") == folder_bytes(whole)


def test_a_record_damaged_before_the_resume_is_written_again(tmp_path: Path) -> None:
    whole = write_bundle(tmp_path / "whole")
    writer = open_writer(tmp_path / "torn")
    for layer, expert in ORDER[:5]:
        writer.write_record(0, layer, expert, encoded(writer, layer, expert))
    writer.suspend()
    file = tmp_path / "torn.part" / "experts-00001.safetensors"
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")  # behind the header
    data[start + 2 * writer.forms[0].layout.size_bytes + 1] ^= 16
    file.write_bytes(data)
    resumed = open_writer(tmp_path / "torn")
    assert resumed.n_written == 2
    write_rest(resumed)
    assert folder_bytes(tmp_path / "torn") == folder_bytes(whole)


@pytest.mark.parametrize("line", range(6))
def test_a_torn_line_of_the_journal_costs_only_what_it_names(tmp_path: Path, line: int) -> None:
    whole = write_bundle(tmp_path / "whole")
    writer = open_writer(tmp_path / "torn")
    for layer, expert in ORDER[:5]:
        writer.write_record(0, layer, expert, encoded(writer, layer, expert))
    writer.suspend()
    journal = tmp_path / "torn.part" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    if line == 0:
        journal.write_bytes(lines[0][:-5])
        with pytest.raises(CorruptArtifactError, match="journal"):
            open_writer(tmp_path / "torn")
        return
    journal.write_bytes(b"".join(lines[:line]) + lines[line][:-5])
    resumed = open_writer(tmp_path / "torn")
    assert resumed.n_written == line - 1
    write_rest(resumed)
    assert folder_bytes(tmp_path / "torn") == folder_bytes(whole)


_DIE_AT_EVERY_CALL = """
import os, signal, sys
from pathlib import Path
from moe_tool.formats import bundle_writer
from tests.formats.small_bundle import write_bundle

bundle_writer._SYNC_BYTES = 3 * 16384
die_at, calls = 0, 0

def counted(real):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    return call

for name in ("fsync", "replace", "rename", "unlink", "write"):
    setattr(os, name, counted(getattr(os, name)))
status = 1
while status:
    die_at += 1
    child = os.fork()
    if not child:
        write_bundle(Path(sys.argv[1], f"killed-{die_at}"))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
print(die_at - 1)
"""


@pytest.mark.slow
def test_a_kill_before_any_change_of_the_disk_leaves_something_to_resume(tmp_path: Path) -> None:
    whole = folder_bytes(write_bundle(tmp_path / "whole"))
    done = subprocess.run(
        [sys.executable, "-c", _DIE_AT_EVERY_CALL, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    n_kills = int(done.stdout)
    assert n_kills > 15
    for number in range(1, n_kills + 1):
        out, part = tmp_path / f"killed-{number}", tmp_path / f"killed-{number}.part"
        if not out.exists():  # it does where the sync after the rename was hit
            for folder in (out, part):
                with pytest.raises((CorruptArtifactError, NotFoundError)):
                    BundleReader.open(folder)
        write_rest(open_writer(out))
        assert folder_bytes(out) == whole, number
        assert not part.exists()


def test_a_finished_bundle_is_found_finished_and_left_alone(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle")
    before = folder_bytes(folder)
    writer = open_writer(tmp_path / "bundle")
    assert writer.finished and writer.n_written == 8 and not writer.to_write
    manifest = writer.finish(heat=None, buddies=None, profile_sha256=None)
    assert len(manifest.primary_records) == 8
    assert folder_bytes(folder) == before


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize(
    ("asked", "error", "words"),
    [
        (other("2"), WrongModelError, ("tiny", "other", "111111111111", "222222222222")),
        ({"bits": "8"}, UsageError, ("forms", "'primary 4'", "'primary 8'")),
        ({"made_from": MADE_FROM | {"profile": "abc"}}, UsageError, ("profile", "none", "abc")),
        ({"made_from": MADE_FROM | {"more": "1"}}, UsageError, ("more", "none", "1")),
    ],
)
def test_a_bundle_of_another_order_is_refused_and_left_alone(
    tmp_path: Path, is_finished: bool, asked: dict, error: type[Exception], words: tuple[str, ...]
) -> None:
    writer = open_writer(tmp_path / "bundle")
    if is_finished:
        write_rest(writer)
    before = folder_bytes(tmp_path)
    with pytest.raises(error) as caught:
        open_writer(tmp_path / "bundle", **asked)
    for word in words:
        assert word in str(caught.value)
    assert "hint: " in str(caught.value)
    assert folder_bytes(tmp_path) == before


@pytest.mark.parametrize("name", ["bundle", "bundle.part"])
def test_a_folder_that_is_something_else_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("the only copy")
    with pytest.raises(UsageError, match=name):
        open_writer(tmp_path / "bundle")
    assert folder_bytes(tmp_path) == {f"{name}/thesis.txt": b"the only copy"}


def test_a_link_at_the_bundles_place_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "bundle").symlink_to("nowhere")
    with pytest.raises(UsageError, match="bundle"):
        open_writer(tmp_path / "bundle")


def test_a_full_disk_keeps_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write_bundle(tmp_path / "whole")
    writer = open_writer(tmp_path / "full")
    for layer, expert in ORDER[:3]:
        writer.write_record(0, layer, expert, encoded(writer, layer, expert))

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(DiskFullError, match="full") as caught:
            writer.write_record(0, *ORDER[3], encoded(writer, *ORDER[3]))
    assert caught.value.exit_code == 4
    writer.suspend()
    resumed = open_writer(tmp_path / "full")
    assert resumed.n_written == 3
    write_rest(resumed)
    assert folder_bytes(tmp_path / "full") == folder_bytes(whole)


def test_a_bundle_is_opened_from_inside_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write_bundle(tmp_path / "bundle"))
    BundleReader.open(Path(".")).close()
