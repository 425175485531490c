"""`moe-tool hardware` writes what it measured or what a data sheet says, and says which."""

import json
from pathlib import Path

import pytest

from moe_tool.artifacts.hardware_profile import HardwareProfile, LookupSpeed
from moe_tool.cli.app import run_command
from moe_tool.errors import DiskFullError
from moe_tool.formats.json_artifact import read_json_artifact, write_json_artifact
from moe_tool.hardware import measure
from moe_tool.hardware.shipped import SHEETS, shipped_profile
from tests.hardware.made_profile import made_profile


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, bool]]:
    """Measure nothing; return what was asked for."""
    asked: list[tuple[Path, bool]] = []

    def answer(folder: Path, *, quick: bool, progress: object) -> HardwareProfile:
        asked.append((folder, quick))
        return made_profile()

    monkeypatch.setattr(measure, "measure_hardware", answer)
    monkeypatch.chdir(tmp_path)
    return asked


def test_this_machine_is_measured_into_the_working_folder(
    asked: list[tuple[Path, bool]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["hardware"]) == 0
    assert asked == [(Path(), False)]
    out, err = capsys.readouterr()
    assert "measured with avx2 kernels" in out and "NOT measured" not in out
    assert "--threads 1 and 8" in out
    assert "2.00 GB/s" in out  # four readers, 4 KiB
    assert "wrote profiles/hardware.json" in err
    assert read_json_artifact(Path("profiles/hardware.json"), HardwareProfile) == made_profile()


def test_how_few_bits_are_multiplied_is_shown_where_it_was_measured(
    asked: list[tuple[Path, bool]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run_command(["hardware"]) == 0
    assert "looked up" not in capsys.readouterr().out
    rows = tuple(
        LookupSpeed(bits="1", tokens=n, multiply_s=4e-5, lookup_s=3e-5 * n, is_used=n == 1)
        for n in (1, 4)
    )
    write_json_artifact(tmp_path / "h.json", made_profile(lookup=rows))
    assert run_command(["inspect", "h.json"]) == 0
    out = capsys.readouterr().out
    assert "looked up: 30 us, 40 us" in out and "multiplied: 120 us, 40 us" in out


def test_json_is_the_profile(
    asked: list[tuple[Path, bool]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["hardware", "--json", "--quick", "--disk", "/", "--out", "x.json"]) == 0
    assert asked == [(Path("/"), True)]
    fields = json.loads(capsys.readouterr().out)
    assert fields.pop("hardware") == "x.json"
    for name in ("seconds", "peak_rss_bytes"):
        fields.pop(name)
    assert HardwareProfile.model_validate_json(json.dumps(fields)) == made_profile()


@pytest.mark.parametrize("name", SHEETS)
def test_a_shipped_profile_is_written_and_marked(
    asked: list[tuple[Path, bool]], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert run_command(["hardware", "--shipped", name]) == 0
    assert asked == []
    out, err = capsys.readouterr()
    assert "NOT measured: from data sheets" in out
    assert "data-sheet figures, nothing was measured" in err
    written = read_json_artifact(Path("profiles/hardware.json"), HardwareProfile)
    assert written == shipped_profile(name)


def test_a_measured_profile_is_replaced_by_a_data_sheet_only_where_it_is_named(
    asked: list[tuple[Path, bool]], capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path("profiles/hardware.json")
    assert run_command(["hardware"]) == 0
    capsys.readouterr()
    assert run_command(["hardware", "--shipped", "laptop-16gb"]) == 2
    err = capsys.readouterr().err
    assert "profiles/hardware.json was measured" in err and "--hardware laptop-16gb" in err
    assert read_json_artifact(path, HardwareProfile) == made_profile()
    assert run_command(["hardware", "--shipped", "laptop-16gb", "--out", str(path)]) == 0
    assert run_command(["hardware", "--shipped", "rtx4090-64gb"]) == 0  # replaces a data sheet
    assert read_json_artifact(path, HardwareProfile) == shipped_profile("rtx4090-64gb")
    assert run_command(["hardware"]) == 0  # measuring again is what it says
    assert read_json_artifact(path, HardwareProfile) == made_profile()


def test_an_unknown_name_is_a_usage_error_that_lists_the_known(
    asked: list[tuple[Path, bool]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["hardware", "--shipped", "abacus"]) == 2
    err = capsys.readouterr().err
    assert "'abacus'" in err and all(name in err for name in SHEETS)
    assert not Path("profiles").exists()


@pytest.mark.parametrize("more", [["--quick"], ["--disk", "."]])
def test_a_shipped_profile_cannot_be_measured(
    asked: list[tuple[Path, bool]], more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["hardware", "--shipped", "minipc-32gb", *more]) == 2
    assert "--shipped cannot be combined" in capsys.readouterr().err


def test_the_list_writes_nothing(
    asked: list[tuple[Path, bool]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["hardware", "--list"]) == 0
    out = capsys.readouterr().out
    assert "not measured" in out and all(name in out for name in SHEETS)
    assert run_command(["hardware", "--list", "--json"]) == 0
    fields = json.loads(capsys.readouterr().out)
    assert list(fields["shipped"]) == list(SHEETS)
    assert asked == [] and not Path("profiles").exists()


def test_what_cannot_be_measured_leaves_the_old_profile(
    asked: list[tuple[Path, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise DiskFullError("no room", hint="free some")

    Path("profiles").mkdir()
    Path("profiles/hardware.json").write_text("old")
    monkeypatch.setattr(measure, "measure_hardware", full)
    assert run_command(["hardware"]) == 4
    assert Path("profiles/hardware.json").read_text() == "old"


def test_inspect_knows_one(
    asked: list[tuple[Path, bool]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["hardware", "--shipped", "rtx4090-64gb", "--out", "x.json"]) == 0
    capsys.readouterr()
    assert run_command(["inspect", "x.json", "--json"]) == 0
    fields = json.loads(capsys.readouterr().out)
    assert fields["kind"] == "hardware profile" and fields["source"] == "data-sheet"
    assert fields["gpu"] == "GeForce RTX 4090" and fields["disk"] and fields["layer_warm_s"] > 0
    assert run_command(["inspect", "x.json"]) == 0
    assert "GB/s" in capsys.readouterr().out
    Path("x.json").write_bytes(Path("x.json").read_bytes()[:-9])
    assert run_command(["inspect", "x.json"]) == 3
