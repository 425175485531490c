"""What `eval-harness` prints, and where."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_tool.cli.app import run_command
from moe_tool.models.locate import LocatedModel
from tests.evaluation.small_tasks import write_tasks
from tests.packed import pack_bundle


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("harness") / "bundle"
    model = LocatedModel(folder=tiny_checkpoint("mixtral"), name="mixtral")
    pack_bundle(model, out=out, bits="native")
    return out


@pytest.mark.slow
def test_a_table_a_footer_and_an_announcement(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    tasks = write_tasks(tmp_path) / "tiny_choice.yaml"
    arguments = ["eval-harness", str(bundle), "--tasks", str(tasks), "--memory", "50%", "--offline"]
    assert run_command([*arguments, "--policy", "random", "--no-gates"]) == 0
    out, err = capsys.readouterr()
    assert "tiny_choice" in out and "acc ↑" in out
    assert err.index("random: a random resident expert") < err.index("read per token")
    assert "substitutions" in err


@pytest.mark.slow
def test_json_is_one_object(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    tasks = write_tasks(tmp_path)
    arguments = ["eval-harness", str(bundle), "--tasks", f"{tasks}/", "--memory", "50%"]
    assert run_command([*arguments, "--limit", "1", "--offline", "--json"]) == 0
    fields = json.loads(capsys.readouterr().out)
    assert [row["task"] for row in fields["rows"]] == ["tiny_choice", "tiny_text"]
    assert fields["policy"] == "exact" and fields["tokens"] > 0
    assert {"hit_rate", "bytes_read_per_token", "substitutions", "slots"} <= fields.keys()


@pytest.mark.slow
def test_a_policy_that_had_nothing_to_answer_is_told(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    tasks = write_tasks(tmp_path) / "tiny_choice.yaml"
    tasks.write_text(
        tasks.read_text().replace("doc_to_choice: choices", "doc_to_choice: [A, B, C]")
    )
    arguments = ["eval-harness", str(bundle), "--tasks", str(tasks), "--memory", "50%", "--offline"]
    arguments += ["--policy", "random", "--no-gates"]
    assert run_command(arguments) == 0
    assert "--decode-context" in capsys.readouterr().err
    assert run_command([*arguments, "--decode-context"]) == 0
    assert "--decode-context" not in capsys.readouterr().err


def test_without_lm_eval_it_is_a_usage_error(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run_command(["eval-harness", str(bundle), "--tasks", "arc_easy"]) == 2
    assert "hint: pip install 'moe-tool[eval-harness]'" in capsys.readouterr().err


def test_no_task_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["eval-harness", "bundle", "--tasks", " ,"]) == 2
    assert "names no task" in capsys.readouterr().err
