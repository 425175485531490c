"""Experts that stay in the checkpoint's files are the copied bundle's, bit for bit."""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_tool.artifacts.source_files import Part, parse_parts, parts_text
from moe_tool.errors import (
    CorruptArtifactError,
    MoeToolError,
    NotFoundError,
    UnsupportedModelError,
    UsageError,
)
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.formats.bundle_writer import BundleWriter
from moe_tool.models.locate import LocatedModel
from moe_tool.profiling.recorder import record_profile
from moe_tool.runtime.decoding_config import GenerateOptions
from moe_tool.runtime.generation import generate_ids
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import open_session
from moe_tool.text.sources import parse_sources
from tests.formats.hostile.damage import json_changed
from tests.models.stored_formats.test_coded_models import PROMPT, write_pair
from tests.packed import pack_bundle
from tests.tiny_models import make_tiny_checkpoint

SECTION = "source-files"


def located(folder: Path) -> LocatedModel:
    return LocatedModel(folder=folder, name="tiny")


def tokens(bundle: Path, memory: str) -> tuple[int, ...]:
    options = run_options(memory=memory, context=64, prompt_tokens=32)
    with open_session(bundle, options) as session:
        generate = GenerateOptions(max_tokens=12, ignore_eos=True)
        return tuple(generate_ids(session, [PROMPT], generate).token_ids[0])


def records(bundle: Path) -> list[bytes]:
    with BundleReader.open(bundle) as reader:
        found = []
        for held in reader.forms:
            out = torch.full((held.record_size_bytes,), 7, dtype=torch.uint8)
            for entry in held.table.records:
                reader.read_record_into(entry.layer, entry.expert, out, form=held.index)
                found.append(out.numpy().tobytes())
        return found


def checkpoint(name: str, folder: Path) -> Path:
    """A coded checkpoint, or one in bfloat16 with shards."""
    if name in ("mixtral", "qwen3_moe", "granitemoe"):
        return make_tiny_checkpoint(name, folder / "model", dtype="bfloat16", max_shard_size="60KB")
    return write_pair(name, folder)[0]


@pytest.mark.parametrize(
    "name", ["mixtral", "qwen3_moe", "granitemoe", "mxfp4", "fp8", "int4", "nvfp4"]
)
def test_a_bundle_in_place_is_the_copied_one_without_its_records(name: str, tmp_path: Path) -> None:
    model = located(checkpoint(name, tmp_path))
    copied = pack_bundle(model, out=tmp_path / "copied").bundle
    report = pack_bundle(model, out=tmp_path / "placed", in_place=True)
    placed = report.bundle
    assert report.source == model.folder
    assert report.expert_bytes > report.written_expert_bytes == 0
    names = {path.name for path in placed.iterdir()}
    assert names == {path.name for path in copied.iterdir() if not path.name.startswith("experts")}
    with BundleReader.open(copied) as old, BundleReader.open(placed) as new:
        assert new.manifest.forms == old.manifest.forms
        assert new.manifest.files == old.manifest.files
        assert report.bytes == sum(
            path.stat().st_size for path in placed.iterdir() if path.name != "manifest.json"
        )
        new.verify_all()
    assert records(placed) == records(copied)
    for memory in ("min", "100%"):
        assert tokens(placed, memory) == tokens(copied, memory)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint in shards and a bundle in place of it."""
    folder = tmp_path_factory.mktemp("whole")
    pack_bundle(located(checkpoint("mixtral", folder)), out=folder / "b", in_place=True)
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """The same in a folder of its own."""
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    change_section(folder, lambda body: body.update(resolved=str(folder / "model")))
    return folder


def change_section(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Edit the section of a manifest, without the manifest's own hash."""
    damage = json_changed(lambda parsed: change(parsed["sections"][SECTION]["body"]))
    damage(folder / "b" / "manifest.json")


def refusal(bundle: Path) -> MoeToolError:
    with pytest.raises(MoeToolError) as found, BundleReader.open(bundle) as reader:
        reader.verify_all()
    assert found.value.exit_code == 3 and found.value.hint
    assert "\n" not in found.value.message
    return found.value


def first_part(folder: Path) -> tuple[Path, Part]:
    """The file and the place of the first expert's first matrix."""
    with BundleReader.open(folder / "b") as reader:
        sources, forms = reader.manifest.sources, reader.forms
    assert sources is not None and forms[0].parts is not None
    part = forms[0].parts[0][0]
    return folder / "model" / sources.files[part.file].name, part


def test_a_checkpoint_that_moved_is_found_where_the_hint_says(copy: Path) -> None:
    wanted = tokens(copy / "b", "min")
    (copy / "model").rename(copy / "elsewhere")
    change_section(copy, lambda body: body.update(folder="nowhere"))
    error = refusal(copy / "b")
    assert isinstance(error, NotFoundError)
    assert "which is not there" in error.message and error.hint is not None
    (command,) = re.findall(r"ln -s NEW_FOLDER (\S+)$", error.hint)
    os.symlink(copy / "elsewhere", command)
    assert tokens(copy / "b", "min") == wanted
    os.unlink(command)
    change_section(copy, lambda body: body.update(folder=str(copy / "elsewhere")))
    assert tokens(copy / "b", "min") == wanted


@pytest.mark.parametrize("is_blocked", [False, True])
def test_a_moved_checkpoint_is_found_by_the_commands_of_the_hint(
    copy: Path, tmp_path: Path, is_blocked: bool
) -> None:
    """The folder around it is gone too, or something else lies in its place."""
    wanted, place = tokens(copy / "b", "min"), tmp_path / "away" / "for good" / "model"
    change_section(copy, lambda body: body.update(resolved=str(place), folder="nowhere"))
    if is_blocked:
        place.parent.mkdir(parents=True)
        place.write_text("a file")
    error = refusal(copy / "b")
    assert ("no folder any more" if is_blocked else "is not there") in error.message
    command = str(error.hint).partition("where it is now: ")[2]
    new_folder = shlex.quote(str(copy / "model"))
    subprocess.run(command.replace("NEW_FOLDER", new_folder), shell=True, check=True)
    assert tokens(copy / "b", "min") == wanted


def test_a_missing_shard_is_named(copy: Path) -> None:
    path, _ = first_part(copy)
    path.unlink()
    error = refusal(copy / "b")
    assert isinstance(error, NotFoundError) and path.name in error.message


def test_a_home_folder_of_nobody_and_links_in_a_loop_are_not_there(copy: Path) -> None:
    path, _ = first_part(copy)
    path.unlink()
    path.symlink_to(path.name)
    assert isinstance(refusal(copy / "b"), NotFoundError)

    def elsewhere(section: dict[str, Any]) -> None:
        section |= {"resolved": str(copy / "nowhere"), "folder": "~nosuchuser-/m"}

    change_section(copy, elsewhere)
    assert isinstance(refusal(copy / "b"), NotFoundError)


def longer(data: bytearray, _: Part) -> bytearray:
    return data + b"x"


def shorter(data: bytearray, _: Part) -> bytearray:
    return data[:-1]


def another_header(data: bytearray, _: Part) -> bytearray:
    return data.replace(b'"BF16"', b'"F16" ', 1)


def another_weight(data: bytearray, part: Part) -> bytearray:
    data[part.offset] ^= 1
    return data


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (longer, "is not the file that the bundle was packed from"),
        (shorter, "is not the file that the bundle was packed from"),
        (another_header, "found another header"),
        (another_weight, "layer 0 expert 0 in .* is damaged: its hash does not fit"),
    ],
)
def test_a_changed_shard_is_refused(
    change: Callable[[bytearray, Part], bytearray], says: str, copy: Path
) -> None:
    path, part = first_part(copy)
    path.write_bytes(change(bytearray(path.read_bytes()), part))
    error = refusal(copy / "b")
    assert re.search(says, error.message) and path.name in error.message
    assert "put the checkpoint back" in str(error.hint)


def test_a_shard_that_changes_during_a_run_is_noticed(copy: Path) -> None:
    path, _ = first_part(copy)
    with BundleReader.open(copy / "b") as reader:
        out = torch.empty(reader.forms[0].record_size_bytes, dtype=torch.uint8)
        reader.read_record_into(0, 0, out, form=0)
        os.utime(path, ns=(1, 1))
        with pytest.raises(CorruptArtifactError, match="was changed after") as found:
            reader.read_record_into(0, 0, out, form=0)
        assert f"leave the checkpoint's {path} alone" in (found.value.hint or "")
        path.unlink()
        with pytest.raises(CorruptArtifactError, match="was changed after") as found:
            reader.read_record_into(0, 0, out, form=0)
        assert f"leave the checkpoint's {path} alone" in (found.value.hint or "")


def test_a_shard_that_shrinks_during_a_run_is_named(copy: Path) -> None:
    path, part = first_part(copy)
    with BundleReader.open(copy / "b") as reader:
        out = torch.empty(reader.forms[0].record_size_bytes, dtype=torch.uint8)
        os.truncate(path, part.offset + 1)
        with pytest.raises(MoeToolError, match="layer 0 expert 0 in .*safetensors") as found:
            reader.read_record_into(0, 0, out, form=0)
        assert "put the checkpoint back" in (found.value.hint or "")


def parts(change: Callable[[list[Part]], list[Part]]) -> Callable[[dict[str, Any]], None]:
    def damage(body: dict[str, Any]) -> None:
        placed = body["tables"][0]["parts"]
        placed[0] = parts_text(change(list(parse_parts(placed[0]))))

    return damage


def first(**changed: int) -> Callable[[dict[str, Any]], None]:
    return parts(lambda found: [replace(found[0], **changed), *found[1:]])


def file(**changed: object) -> Callable[[dict[str, Any]], None]:
    return lambda body: body["files"][0].update(changed)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (file(name="../model.safetensors"), "name"),
        (file(name="/etc/passwd"), "name"),
        (file(name="a/b"), "name"),
        (file(size_bytes=2**49), "is not the file"),
        (file(header_bytes=0), "header_bytes"),
        (file(header_bytes=2**40), "header_bytes"),
        (file(header_sha256="0" * 64), "another header"),
        (first(file=99), "lies in file 99"),
        (first(offset=2**45), "ends beyond"),
        (first(offset=0), "begins in the header"),
        (first(size_bytes=0), "is empty"),
        (first(size_bytes=2**45), "ends beyond"),
        (first(size_bytes=2), "do not fill gate_up_proj"),
        (first(times=3), "do not fill gate_up_proj"),
        (first(times=10**15), "do not fill gate_up_proj"),
        (first(times=0), "more parts than it holds"),
        (first(times=0, size_bytes=3), "holds no numbers of two bytes"),
        (parts(lambda found: found[:-1]), "do not fill down_proj"),
        (parts(lambda found: [*found, found[-1]]), "more parts than it holds"),
        (parts(lambda found: found[::-1]), "is damaged: its hash does not fit"),
        (lambda body: body["tables"][0]["parts"].pop(), "not as many as the records"),
        (lambda body: body["tables"][0]["parts"].__setitem__(0, "0 -1 5"), "parts"),
        (lambda body: body["tables"][0]["parts"].__setitem__(0, ""), "parts"),
        (lambda body: body["tables"][0].update(form=1), "no checkpoint holds"),
        (lambda body: body["tables"].append(body["tables"][0]), "placed twice"),
        (lambda body: body["files"].append(body["files"][0]), "listed twice"),
        (lambda body: body.update(resolved="model", folder="/"), "resolved"),
        (lambda body: body.update(resolved="/", folder="/"), "is not there"),
        (lambda body: body.update(extra=1), "extra"),
    ],
)
def test_a_forged_section_is_refused(
    damage: Callable[[dict[str, Any]], object], says: str, copy: Path
) -> None:
    change_section(copy, damage)
    assert says in refusal(copy / "b").message


def test_an_optional_section_is_refused(copy: Path) -> None:
    json_changed(lambda parsed: parsed["sections"][SECTION].update(required=False))(
        copy / "b" / "manifest.json"
    )
    assert "not marked as required" in refusal(copy / "b").message


def test_a_link_to_elsewhere_is_refused_by_run_and_by_pack(copy: Path, tmp_path: Path) -> None:
    path, _ = first_part(copy)
    path.rename(tmp_path / path.name)
    path.symlink_to(tmp_path / path.name)
    assert "is a link to a file elsewhere" in refusal(copy / "b").message
    with pytest.raises(CorruptArtifactError, match="is a link to a file elsewhere") as found:
        pack_bundle(located(copy / "model"), out=tmp_path / "new", in_place=True)
    assert "pack without --in-place" in str(found.value.hint)


def test_the_links_of_a_hub_snapshot_are_followed(copy: Path) -> None:
    wanted = tokens(copy / "b", "min")
    repository = copy / "models--owner--name"
    snapshot = repository / "snapshots" / ("c" * 40)
    snapshot.parent.mkdir(parents=True)
    (repository / "blobs").mkdir()
    shutil.move(copy / "model", snapshot)
    for path in sorted(snapshot.iterdir()):
        blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(blob)
        path.symlink_to(Path("../../blobs") / blob.name)
    report = pack_bundle(located(snapshot), out=copy / "new", in_place=True)
    assert tokens(report.bundle, "min") == wanted


def test_another_layout_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = located(make_tiny_checkpoint("gpt_oss", tmp_path / "model", dtype="bfloat16"))
    with pytest.raises(UnsupportedModelError, match="layer 0 expert 0 needs gate_up_pr") as found:
        pack_bundle(model, out=tmp_path / "b", in_place=True)
    assert found.value.exit_code == 3
    assert found.value.hint == "pack without --in-place"
    with pytest.raises(UsageError, match="all experts get new codes"):
        pack_bundle(model, out=tmp_path / "b", bits="4", in_place=True)
    assert not (tmp_path / "b.part").exists()


@pytest.mark.parametrize("after", [0, 1, 9])
def test_an_interrupted_pack_in_place_resumes_to_the_same_manifest(
    after: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = BundleWriter.write_record

    def killing(self: BundleWriter, *args: Any, **more: Any) -> None:
        if self.n_written == after:
            raise KeyboardInterrupt
        write(self, *args, **more)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(BundleWriter, "write_record", killing)
        pack_bundle(located(whole / "model"), out=tmp_path / "b", in_place=True)
    with pytest.raises(UsageError, match="in_place"):
        pack_bundle(located(whole / "model"), out=tmp_path / "b")
    report = pack_bundle(located(whole / "model"), out=tmp_path / "b", in_place=True)
    assert report.resumed_records == after
    wanted = (whole / "b" / "manifest.json").read_bytes()
    assert (tmp_path / "b" / "manifest.json").read_bytes() == wanted
    again = pack_bundle(located(whole / "model"), out=tmp_path / "b", in_place=True)
    assert again.resumed_records == len(records(tmp_path / "b"))


def test_replicas_are_written_beside_experts_in_place(whole: Path, tmp_path: Path) -> None:
    model, profile = located(whole / "model"), tmp_path / "p.h5"
    record_profile(model, parse_sources(["builtin"]), out=profile, tokens=256, seq_len=32)
    made = [
        pack_bundle(model, out=tmp_path / name, profile=profile, replicas="4", in_place=in_place)
        for name, in_place in (("copied", False), ("placed", True))
    ]
    assert records(made[0].bundle) == records(made[1].bundle)
    names = {path.name for path in made[1].bundle.iterdir()}
    assert "replicas-4-00001.safetensors" in names
    assert not any(name.startswith("experts") for name in names)


def test_a_read_can_be_cancelled_after_every_piece(whole: Path) -> None:
    with BundleReader.open(whole / "b") as reader:
        out = torch.empty(reader.forms[0].record_size_bytes, dtype=torch.uint8)
        seen: list[int] = []
        reader.read_record_into(0, 0, out, form=0, go_on=lambda n: seen.append(n) or True)
        assert sum(seen) == out.numel() and len(seen) > 2
        asked: list[int] = []
        reader.read_record_into(0, 1, out, form=0, go_on=lambda n: asked.append(n) or False)
        assert len(asked) == 1
