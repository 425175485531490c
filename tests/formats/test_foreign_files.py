"""What is given in place of a checkpoint or a bundle is named, and the hints help when followed."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from moe_tool.errors import CorruptArtifactError, MoeToolError, UnsupportedModelError
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.models.architecture import open_model
from moe_tool.models.generation_settings import read_generation_settings
from moe_tool.models.locate import LocatedModel, locate_model
from moe_tool.models.tokenizer import load_tokenizer
from tests.gguf_file import gguf_bytes

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123456\n"
PAGE = b"<!DOCTYPE html><html>Entry not found</html>"
WEIGHTS = "model.safetensors"


@pytest.fixture
def copied(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint("mixtral"), tmp_path / "my model"))


def refusal_of(folder: Path) -> MoeToolError:
    with pytest.raises(MoeToolError) as caught:
        open_model(LocatedModel(folder=folder, name="m"))
    assert caught.value.exit_code == 3
    return caught.value


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
@pytest.mark.parametrize(
    ("content", "says", "hint"),
    [
        (POINTER, "is a Git LFS pointer", "git lfs pull"),
        (PAGE, "is a web page", "hf auth login"),
        (b"GGUF" + bytes(100), "is a GGUF file", "beside config.json"),
    ],
)
def test_a_file_that_is_something_else_is_named(
    name: str, content: bytes, says: str, hint: str, copied: Path
) -> None:
    (copied / name).write_bytes(content)
    error = refusal_of(copied)
    assert f"{copied / name} {says}" in error.message
    assert hint in (error.hint or "")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "merges.txt"])
def test_a_tokenizer_that_is_a_pointer_is_named(name: str, copied: Path) -> None:
    (copied / name).write_bytes(POINTER)
    with pytest.raises(CorruptArtifactError, match=rf"{name} is a Git LFS pointer"):
        load_tokenizer(copied)


@pytest.mark.parametrize(("content", "says"), [(POINTER, "Git LFS pointer"), (PAGE, "web page")])
def test_an_index_or_settings_that_are_something_else_are_named(
    content: bytes, says: str, copied: Path
) -> None:
    (copied / "generation_config.json").write_bytes(content)
    with pytest.raises(CorruptArtifactError, match=rf"generation_config\.json is a {says}"):
        read_generation_settings(copied)
    (copied / WEIGHTS).rename(copied / "model-00001-of-00001.safetensors")
    (copied / f"{WEIGHTS}.index.json").write_bytes(content)
    assert f"{copied / WEIGHTS}.index.json is a {says}" in refusal_of(copied).message


@pytest.mark.parametrize(
    ("called", "says"),
    [
        (("consolidated.safetensors",), r"only as consolidated\.safetensors"),
        (
            ("model-00001-of-00002.safetensors", "x.safetensors"),
            "holds 2 safetensors files, but no",
        ),
        (("adapter_model.safetensors", "adapter_config.json"), "holds an adapter, not a model"),
    ],
)
@pytest.mark.parametrize("has_config", [True, False])
def test_weights_of_another_form_are_named(
    called: tuple[str, ...], says: str, has_config: bool, copied: Path
) -> None:
    for name in called:
        shutil.copy(copied / WEIGHTS, copied / name)
    (copied / WEIGHTS).unlink()
    if not has_config:
        (copied / "config.json").unlink()
    assert refusal_of(copied).message.startswith(str(copied))
    with pytest.raises(MoeToolError, match=says):
        open_model(LocatedModel(folder=copied, name="m"))


def test_the_hint_about_a_lone_shard_makes_it_a_checkpoint(copied: Path) -> None:
    (copied / WEIGHTS).rename(copied / "model-00001-of-00001.safetensors")
    error = refusal_of(copied)
    assert "no model.safetensors.index.json" in error.message
    command = (error.hint or "").partition("mv ")[2].partition(";")[0]
    subprocess.run(["/bin/sh", "-c", f"mv {command}"], check=True)
    open_model(LocatedModel(folder=copied, name="m")).checkpoint.close()


@pytest.mark.parametrize("rename", ["base_model.model.{}", None])
def test_an_adapter_that_was_not_merged_is_named(rename: str | None, copied: Path) -> None:
    def wrapped(name: str) -> str:
        if rename is not None:
            return rename.format(name)
        return name.replace("o_proj.weight", "o_proj.base_layer.weight")

    tensors = load_file(copied / WEIGHTS)
    save_file({wrapped(n): t for n, t in tensors.items()}, copied / WEIGHTS, {"format": "pt"})
    error = refusal_of(copied)
    assert isinstance(error, UnsupportedModelError) and "adapter around it" in error.message
    assert "merge" in (error.hint or "")


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("quantize_config.json", {}, "stored in gptq format with bits 'None'"),
        (
            "hf_quant_config.json",
            {"quantization": {"quant_algo": "W4A8_AWQ"}},
            "stored in modelopt format with quant_algo 'W4A8_AWQ'",
        ),
    ],
)
def test_a_format_that_a_file_beside_the_weights_describes(
    file: str, content: dict[str, object], words: str, copied: Path
) -> None:
    (copied / file).write_text(json.dumps(content))
    assert words in refusal_of(copied).message


def test_a_format_that_mlx_describes(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    config["quantization"] = {"group_size": 64, "bits": 5}
    (copied / "config.json").write_text(json.dumps(config))
    assert "stored in mlx format with bits '5'" in refusal_of(copied).message


def test_a_single_file_is_no_model(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MoeToolError, match="is a file of weights, not") as caught:
        locate_model(str(copied / WEIGHTS), offline=True)
    assert str(copied) in (caught.value.hint or "")
    gguf = copied / "m.gguf"
    gguf.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UnsupportedModelError, match="is a GGUF file"):
        locate_model(str(gguf), offline=True)
    (copied / "demo").write_text("a file that is called like an alias")
    monkeypatch.chdir(copied)
    assert locate_model("demo", offline=True).name == "demo"


def test_what_is_no_bundle_gets_a_hint_that_removes_nothing(copied: Path) -> None:
    gguf = copied / "m.gguf"
    gguf.write_bytes(b"GGUF" + bytes(100))
    os.mkfifo(copied / "pipe")
    for path, says, hint in (
        (gguf, "is a GGUF file", "beside config.json"),
        (copied / WEIGHTS, "is a file of weights, not a bundle", "moe-tool pack"),
        (copied / "pipe", "of no known kind, not a bundle", "moe-tool pack"),
        (copied, "is a checkpoint, not a bundle", f"moe-tool pack '{copied}' --out bundle/"),
    ):
        with pytest.raises(MoeToolError, match=says) as caught:
            BundleReader.open(path)
        assert hint in (caught.value.hint or "") and "remove" not in (caught.value.hint or "")


def test_the_hint_about_a_gguf_file_makes_it_a_model(copied: Path, tmp_path: Path) -> None:
    metadata = {"general.architecture": "llama"}
    (tmp_path / "m.gguf").write_bytes(gguf_bytes(metadata, {}))
    with pytest.raises(UnsupportedModelError, match="is a GGUF file") as caught:
        locate_model(str(tmp_path / "m.gguf"), offline=True)
    assert "a folder that holds it" in (caught.value.hint or "")
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "m.gguf").rename(folder / "m.gguf")
    error = refusal_of(folder)
    assert "holds its weights as GGUF, but no config.json" in error.message
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert name in (error.hint or "")
        shutil.copy(copied / name, folder)
    assert "lacks a tensor" in refusal_of(folder).message  # the file is read, and is empty
    load_tokenizer(folder)
