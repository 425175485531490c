"""`tune weights` from the command line: what it says, and how it ends."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_tool.cli.app import run_command
from moe_tool.kept_work import keeping
from moe_tool.models.locate import LocatedModel
from tests.packed import pack_bundle

QUICK = ["--data", "builtin", "--tokens", "512", "--seq-len", "32", "--steps", "4", "--batch", "64"]


def test_a_bundle_is_tuned_and_the_next_command_is_named(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_checkpoint("mixtral")
    pack_bundle(LocatedModel(folder=folder, name="tiny"), out=tmp_path / "b", bits="3")
    out = tmp_path / "t"
    typed = ["tune", "weights", str(tmp_path / "b"), "--model", str(folder), "--out", str(out)]
    assert run_command([*typed, *QUICK, "--json"]) == 0
    printed = capsys.readouterr()
    fields = json.loads(printed.out)
    assert fields["bundle"] == str(out) and len(fields["layers"]) == 3
    assert fields["state_bytes_per_weight"] == 4
    assert fields["lineage"][0]["steps"] == 4
    assert f"next: moe-tool evaluate {out}/ --reference {folder}" in printed.err
    assert run_command(["inspect", str(out), "--verify", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["lineage"] == fields["lineage"]
    assert facts["tuned_from"] == fields["lineage"][0]["parent_sha256"]
    # What is there already is found finished.
    assert run_command([*typed, *QUICK, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == []
    # And what was asked otherwise is refused.
    assert run_command([*typed, *QUICK, "--seed", "1"]) == 2
    assert "tune.seed" in capsys.readouterr().err


def test_norms_and_routers_are_trained_and_what_is_kept_is_said(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from moe_tool.cli import tune_weights as words
    from moe_tool.tuning.tune_options import FLOAT_RATE

    assert words._FLOAT_RATE == FLOAT_RATE
    folder = tiny_checkpoint("qwen3_moe")
    pack_bundle(LocatedModel(folder=folder, name="tiny"), out=tmp_path / "b", bits="2")
    typed = ["tune", "weights", str(tmp_path / "b"), "--model", str(folder), "--router"]
    typed += [*QUICK, "--tokens", "1024", "--out", str(tmp_path / "t")]
    assert run_command([*typed, "--float-rate", "0"]) == 0
    assert "routers: nothing kept, since it does not pay" in capsys.readouterr().out
    assert run_command([*typed, "--float-rate", "0", "--json"]) == 0
    floats = json.loads(capsys.readouterr().out)["floats"]
    assert (floats["norms"], floats["router"], floats["kept"]) == (None, 0, False)
    typed.remove("--router")
    assert run_command([*typed, "--float-rate", "0"]) == 2
    assert "add --norms or --router" in capsys.readouterr().err


def test_an_interrupted_tuning_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(**_: object) -> None:
        with keeping(lambda: True):
            raise KeyboardInterrupt

    monkeypatch.setattr("moe_tool.cli.verb.open_output", interrupt)
    typed = ["tune", "weights", "b", "--model", "demo", "--data", "builtin", "--out", "t"]
    assert run_command(typed) == 130
    assert capsys.readouterr().err == (
        "interrupted; finished work is kept: resume with\n"
        "    moe-tool tune weights b --model demo --data builtin --out t\n"
    )


@pytest.mark.parametrize(
    "wrong", [["--steps", "0"], ["--rate", "0"], ["--optimizer", "magic"], ["--memory", "lots"]]
)
def test_options_that_mean_nothing_are_refused(
    wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    typed = ["tune", "weights", "b", "--model", "demo", "--data", "builtin", "--out", "t", *wrong]
    assert run_command(typed) == 2
    assert "hint: " in capsys.readouterr().err


def test_without_a_verb_it_says_which_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["tune"]) == 2
    printed = capsys.readouterr()
    assert "weights" in printed.out + printed.err
