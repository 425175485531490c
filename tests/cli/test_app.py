"""Every end of a command has its exit code and its words."""

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_tool.cli import verb
from moe_tool.cli.app import run_command
from moe_tool.errors import BudgetError, NotFoundError
from moe_tool.kept_work import keeping
from moe_tool.profiling.parts_folder import PartsFolder

Fail = Callable[[BaseException], None]


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Fail:
    """Make `inspect` end in an exception."""

    def set_error(error: BaseException) -> None:
        def broken(**_: object) -> None:
            raise error

        monkeypatch.setattr(verb, "open_output", broken)

    return set_error


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (NotFoundError("no such thing", hint="make it"), 3, "NotFoundError"),
        (BudgetError("too small", hint="--memory 2GiB"), 4, "BudgetError"),
        (OSError(errno.ENOSPC, "No space left on device", "bundle/x"), 4, "DiskFullError"),
        (OSError(errno.EIO, "Input/output error", "bundle/x"), 3, "StorageError"),
        (PermissionError(errno.EACCES, "Permission denied", "bundle/x"), 3, "StorageError"),
        (MemoryError(), 4, "MoeToolError"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 4, "MoeToolError"),
        (ValueError("our mistake"), 1, "ValueError"),
        (KeyboardInterrupt(), 130, "Interrupted"),
    ],
)
def test_every_error_has_its_exit_code(
    error: BaseException,
    code: int,
    kind: str,
    fail: Fail,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fail(error)
    assert run_command(["inspect", "x", "--json"]) == code
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["type"] == kind
    assert json.loads(out)["error"]["exit_code"] == code
    assert ("Traceback" in err) == (code == 1)


def test_an_error_is_a_sentence_a_blank_line_and_a_hint(
    fail: Fail, capsys: pytest.CaptureFixture[str]
) -> None:
    fail(NotFoundError("there is no profile in profiles/", hint="moe-tool profile demo"))
    assert run_command(["inspect", "x"]) == 3
    assert capsys.readouterr() == (
        "",
        "error: there is no profile in profiles/\n\nhint: moe-tool profile demo\n",
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["profile", "demo", "--data", "my text"],
            "moe-tool profile demo --data 'my text' --resume",
        ),
        (["pack", "demo"], "moe-tool pack demo"),
    ],
)
def test_an_interrupted_stage_says_how_to_go_on(
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(**_: object) -> None:
        with keeping(lambda: True):
            raise KeyboardInterrupt

    monkeypatch.setattr(verb, "open_output", interrupt)
    assert run_command(arguments) == 130
    assert capsys.readouterr().err == (
        f"interrupted; finished work is kept: resume with\n    {words}\n"
    )


@pytest.mark.parametrize(("at", "is_kept"), [("open", False), ("keep_digests", True)])
def test_nothing_is_said_to_be_kept_before_a_layer_is_finished(
    at: str,
    is_kept: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PartsFolder, at, interrupt)
    words = ["profile", "demo", "--data", "builtin", "--tokens", "256", "--seq-len", "64"]
    assert run_command([*words, "--out", str(tmp_path / "p.h5")]) == 130
    assert ("finished work is kept" in capsys.readouterr().err) is is_kept
    assert any(tmp_path.glob("p.h5.parts/layer-*.h5")) is is_kept


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["run"],
        ["run", "bundle", "--max-tokens", "many"],
        ["run", "bundle", "--policy", "magic"],
        ["run", "bundle"],
        ["run", "bundle", "--prompt", "a", "-"],
        ["run", "bundle", "the prompt"],
        ["profile", "demo"],
        ["profile", "demo", "--data", "builtin", "--memory", "lots"],
        [],
    ],
)
def test_a_wrong_command_line_is_a_usage_error(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "hint: " in err or err.startswith("Usage: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "nowhere", "--prompt", "x", "--policy", "magic"],
        ["run", "nowhere", "--prompt", "x", "--eviction", "magic"],
        ["evaluate", "nowhere", "--data", "nowhere.txt", "--policy", "magic"],
        ["evaluate", "nowhere", "--data", "nowhere.txt", "--eviction", "magic"],
        ["bench", "nowhere", "--policy", "exact,magic"],
        ["bench", "nowhere", "--eviction", "lru", "--eviction", "magic"],
        ["calibrate", "nowhere", "--data", "nowhere.txt", "--max-kl", "0.1", "--policy", "magic"],
    ],
)
def test_an_unknown_policy_is_refused_before_anything_is_opened(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(arguments) == 2
    assert "magic" in capsys.readouterr().err


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["--version"]) == 0
    assert capsys.readouterr().out.count(".") == 2


@pytest.mark.parametrize(
    ("arguments", "also_heavy"),
    [
        (["--help"], {"numpy", "pydantic"}),
        (["run", "--help"], set()),  # the registries of policies need both
        (["pack", "--help"], set()),
    ],
)
def test_help_answers_at_once_because_nothing_heavy_is_imported(
    arguments: list[str], also_heavy: set[str]
) -> None:
    code = f"import sys, moe_tool.cli.app as a; a.run_command({arguments}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    heavy = {"torch", "transformers", "datasets", "sklearn", "h5py", "rich"}
    assert loaded & (heavy | also_heavy) == set()


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m moe_tool run --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.strip() in ("0", "141")


def test_no_verb_is_cut_in_the_middle_at_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run_command(["--help"]) == 0
    shown = capsys.readouterr().out
    verbs = shown.split("Commands:")[1]
    assert "simulate" in verbs and "..." not in verbs


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "--memory", "1GiB", "--context", "9" * 20],
        ["simulate", "--context", "9" * 20],
        ["simulate", "--eviction", f"lfu:halve-every={'9' * 5000}"],
        ["run", "bundle", "--prompt", "x", "--context", "9" * 20],
        ["plan", "--memory", "1GiB", "--disk", "9" * 400],
    ],
)
def test_a_number_beyond_all_sense_is_a_usage_error(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(arguments) == 2
    assert "hint: " in capsys.readouterr().err
