"""Commands that take their arguments as one dataclass."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from moe_tool.cli.console import Output
from moe_tool.cli.verb import options_from, verb
from moe_tool.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class _Arguments:
    name: Annotated[str, typer.Argument(metavar="NAME")]
    how_often: Annotated[int, typer.Option(metavar="N", min=1)] = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    how_often: int = 7
    seed: int = 0


def test_fields_become_arguments_and_options_and_json_is_added() -> None:
    @verb
    def greet(given: _Arguments, output: Output) -> None:
        """Greet."""
        output.result({"greetings": [given.name] * given.how_often, "seconds": 0})

    app = typer.Typer()
    app.command()(greet)
    printed = CliRunner().invoke(app, ["you", "--how-often", "3", "--json"])
    assert printed.exit_code == 0
    assert '"greetings": ["you", "you", "you"]' in printed.stdout
    assert CliRunner().invoke(app, ["you"]).stdout == ""
    assert CliRunner().invoke(app, ["you", "--how-often", "0"]).exit_code == 2


def test_options_are_taken_by_name_and_none_may_be_missing() -> None:
    given = _Arguments(name="you", how_often=3)
    assert options_from(given, _Options, seed=5) == _Options(how_often=3, seed=5)
    with pytest.raises(AttributeError, match="seed"):
        options_from(given, _Options)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Paths:
    out: Annotated[Path, typer.Option()] = Path("out")


def test_paths_may_begin_in_a_home_folder_that_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    seen = []

    @verb
    def write(given: _Paths, output: Output) -> None:
        """Write."""
        seen.append(given.out)

    app = typer.Typer()
    app.command()(write)
    CliRunner().invoke(app, ["--out=~/b"])
    assert seen == [tmp_path / "b"]
    refused = CliRunner().invoke(app, ["--out=~nosuchuser-/b"]).exception
    assert isinstance(refused, UsageError) and "~nosuchuser-/b" in refused.message
    assert seen == [tmp_path / "b"]
