"""One mistake each: a sentence, a hint, the right exit code, no traceback, and nothing touched."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pipeline.commands import Done, Pipeline, moe_tool

pytestmark = pytest.mark.slow


def refused(done: Done, code: int, *words: str) -> None:
    assert done.code == code, f"{done.code}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n\nhint: ") == 1
    for word in words:
        assert word in done.stderr, done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ("profile", "./missing", "--data", "words=./words.txt"),
        ("profile", "MODEL", "--data", "./missing.txt"),
        ("buddies", "missing.h5"),
        ("pack", "./missing"),
        ("pack", "MODEL", "--profile", "missing.h5", "--out", "other"),
        ("pack", "MODEL", "--buddies", "missing.json", "--out", "other"),
        ("run", "missing", "--prompt", "the list"),
        ("run", "bundle", "--prompt-file", "missing.txt"),
        ("evaluate", "missing", "--data", "words=./words.txt"),
        ("inspect", "missing"),
    ],
    ids=" ".join,
)
def test_what_is_missing_is_named(pipeline: Pipeline, arguments: tuple[str, ...]) -> None:
    typed = [str(pipeline.model) if word == "MODEL" else word for word in arguments]
    refused(moe_tool(*typed, folder=pipeline.folder), 3, "missing")


@pytest.mark.parametrize("verb", ["run", "evaluate", "inspect"])
def test_a_foreign_folder_is_no_bundle(pipeline: Pipeline, tmp_path: Path, verb: str) -> None:
    (tmp_path / "notes.txt").write_text("not a bundle")
    extra = {
        "run": ("--prompt", "the list"),
        "evaluate": ("--data", "words=./words.txt"),
        "inspect": (),
    }[verb]
    refused(moe_tool(verb, tmp_path, *extra, folder=pipeline.folder), 3, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_profile_of_another_model_is_refused_by_name(
    pipeline: Pipeline, tiny_checkpoint: Callable[..., Path]
) -> None:
    other = tiny_checkpoint("qwen3_moe")
    profile = pipeline.profile.fields["profile"]
    done = moe_tool("pack", other, "--profile", profile, "--out", "other", folder=pipeline.folder)
    refused(done, 3, pipeline.model.name, other.name)
    assert not (pipeline.folder / "other").exists()


def test_another_model_takes_no_artifacts_of_this_one(
    pipeline: Pipeline, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    other = tiny_checkpoint("qwen3_moe")
    done = moe_tool("pack", other, "--out", tmp_path / "b", "--json", folder=pipeline.folder)
    assert done.code == 0
    assert done.fields["profile"] is None and done.fields["buddies"] is None
    assert "packing without" in done.stderr


def test_a_bundle_is_not_packed_over_another_one(pipeline: Pipeline) -> None:
    before = (pipeline.folder / "bundle" / "manifest.json").read_bytes()
    done = moe_tool(
        "pack", pipeline.model, "--bits", "4", "--out", "bundle", folder=pipeline.folder
    )
    assert done.code in (2, 3) and "Traceback" not in done.stderr
    assert (pipeline.folder / "bundle" / "manifest.json").read_bytes() == before


def test_a_budget_too_small_says_what_is_needed(pipeline: Pipeline) -> None:
    done = moe_tool(
        "run", "bundle", "--prompt", "the list", "--memory", "1MiB", folder=pipeline.folder
    )
    refused(done, 4, "has 1.00 MiB (1048576 bytes)", "needs")


def test_an_unknown_policy_is_a_usage_error(pipeline: Pipeline) -> None:
    done = moe_tool(
        "run", "bundle", "--prompt", "the list", "--policy", "magic", folder=pipeline.folder
    )
    refused(done, 2, "magic", "next-ranked")


def test_a_half_written_bundle_is_named_with_the_way_on(pipeline: Pipeline, tmp_path: Path) -> None:
    part = tmp_path / "bundle.part"
    shutil.copytree(pipeline.folder / "bundle", part)
    (part / "manifest.json").unlink()
    done = moe_tool("inspect", part, "--json", folder=pipeline.folder)
    assert done.code == 3
    assert done.fields["kind"] == "half-written bundle" and done.fields["intact"] is False
    assert "moe-tool pack" in done.fields["checked"]
    refused(moe_tool("run", part, "--prompt", "the list", folder=pipeline.folder), 3, "pack")


def test_a_flipped_bit_is_found_and_named(pipeline: Pipeline, tmp_path: Path) -> None:
    damaged = tmp_path / "bundle"
    shutil.copytree(pipeline.folder / "bundle", damaged)
    (file,) = damaged.glob("experts-*.safetensors")
    data = bytearray(file.read_bytes())
    header_bytes = 8 + int.from_bytes(data[:8], "little")
    data[header_bytes + 5] ^= 1
    file.write_bytes(data)
    verified = moe_tool("inspect", damaged, "--verify", folder=pipeline.folder)
    refused(verified, 3, file.name)
    ran = moe_tool("run", damaged, "--prompt", "the list", folder=pipeline.folder)
    refused(ran, 3, file.name, "layer", "expert")


def test_errors_are_one_json_object_too(pipeline: Pipeline) -> None:
    done = moe_tool("inspect", "missing", "--json", folder=pipeline.folder)
    assert done.code == 3
    assert done.fields["error"]["type"] == "NotFoundError"
    assert done.fields["error"]["exit_code"] == 3
    assert done.fields["error"]["hint"]


def test_without_network_it_is_tried_once(tmp_path: Path) -> None:
    """The libraries would try again and again."""
    counted = (
        "import socket, sys\n"
        "tried, connect = [], socket.socket.connect\n"
        "socket.socket.connect = lambda s, to: (tried.append(to), connect(s, to))[1]\n"
        "from moe_tool.cli.app import run_command\n"
        "code = run_command(['profile', 'mixtral', '--data', 'wikitext'])\n"
        "print(code, tried)\n"
    )
    environment = {
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
    }
    done = subprocess.run(
        [sys.executable, "-c", counted],
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "3 [('127.0.0.1', 9)]\n"
    assert "mixtral" in done.stderr and str(tmp_path / "cache") in done.stderr
    assert done.stderr.count("\n\nhint: ") == 1
    assert list(tmp_path.iterdir()) == []
