"""The same through the command line: exit code 3, one hint, no traceback, nothing touched."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_tool.artifacts.bundle_manifest import BundleManifest, Calibration
from moe_tool.artifacts.bundle_sections import QualityFigure
from moe_tool.cli.app import run_command
from moe_tool.formats.json_artifact import read_json_artifact, write_json_artifact
from tests.formats import samples
from tests.formats.hostile.damage import Damage, content, cut, flip, in_file
from tests.planning.made_plan import made_plan

RECORDS = "experts-00001.safetensors"


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("mixtral")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle, a profile, a map and a checkpoint of models that do not belong together."""
    folder = tmp_path / "work"
    folder.mkdir()
    samples.write_bundle(folder / "bundle", samples.make_checkpoint(tmp_path / "source"))
    samples.make_profile(folder / "p.h5")
    samples.make_buddies(folder / "b.buddies.json")
    return folder


def require_refused(
    capsys: pytest.CaptureFixture[str], folder: Path, arguments: list[str], says: str
) -> None:
    before = samples.tree_hash(folder)
    code = run_command(arguments)
    captured = capsys.readouterr()
    assert code == 3, captured.err
    assert "Traceback" not in captured.err
    assert captured.err.count("hint: ") == 1 and says in captured.err, captured.err
    assert captured.out == ""
    assert samples.tree_hash(folder) == before


@pytest.mark.parametrize(
    ("damage", "arguments", "says"),
    [
        (in_file("bundle/manifest.json", cut(-9)), ["inspect", "bundle"], "manifest.json"),
        (in_file("bundle/manifest.json", content(b"[" * 10**6)), ["inspect", "bundle"], "nest"),
        (in_file("bundle/" + RECORDS, cut(-1)), ["inspect", "bundle"], RECORDS),
        (in_file("bundle/" + RECORDS, flip(-1)), ["inspect", "bundle", "--verify"], "layer 2"),
        (in_file("bundle/" + RECORDS, cut(3)), ["run", "bundle", "--prompt", "a"], RECORDS),
        (in_file("bundle/manifest.json", content(b"")), ["run", "bundle", "--prompt", "a"], "json"),
        (in_file("p.h5", flip(1000)), ["inspect", "p.h5"], "p.h5"),
        (in_file("p.h5", cut(4000)), ["buddies", "p.h5", "--out", "new.json"], "p.h5"),
        (in_file("p.h5", content(b"")), ["buddies", "p.h5", "--out", "new.json"], "p.h5"),
        (in_file("b.buddies.json", cut(-3)), ["inspect", "b.buddies.json"], "b.buddies.json"),
        (in_file("b.buddies.json", content(b"\xff")), ["inspect", "b.buddies.json"], "UTF-8"),
    ],
)
def test_a_damaged_artifact(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Damage,
    arguments: list[str],
    says: str,
) -> None:
    damage(folder)
    monkeypatch.chdir(folder)
    require_refused(capsys, folder, arguments, says)


@pytest.mark.parametrize(
    ("option", "artifact", "says"),
    [
        ("--profile", "p.h5", "was made from tiny"),
        ("--buddies", "b.buddies.json", "was made from tiny"),
        ("--profile", "b.buddies.json", "is a buddy map, not a profile"),
        ("--buddies", "p.h5", "p.h5"),
    ],
)
def test_pack_refuses_what_belongs_to_another_model(
    folder: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: str,
    artifact: str,
    says: str,
) -> None:
    monkeypatch.chdir(folder)
    require_refused(capsys, folder, ["pack", str(model), option, artifact, "--out", "new"], says)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", cut(-1)),
        ("model.safetensors", cut(100)),
        ("model.safetensors", content(b"")),
        ("model.safetensors", content(b"\xff" * 64)),
        ("config.json", content(b"")),
        ("config.json", content(b"{")),
        ("config.json", content(b"[" * 10**5)),
    ],
)
def test_pack_refuses_a_damaged_checkpoint(
    folder: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    damage: Damage,
) -> None:
    shutil.copytree(model, folder / "model")
    damage(folder / "model" / name)
    monkeypatch.chdir(folder)
    require_refused(capsys, folder, ["pack", "model", "--out", "new"], name)


@pytest.mark.parametrize(
    "change",
    [
        {"eviction": "evil"},
        {"policy": "evil:rho=1"},
        {"policy": "priced:nats-per-mb=nan"},
        {"policy": "priced:evil=1"},
        {"replicas": "4,evil"},
        {"replicas": "rank99999"},
        {"replicas": "4,4"},
    ],
)
def test_what_a_plan_cannot_have_is_the_plans_fault(
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, str],
) -> None:
    evil = made_plan().model_copy(update=change)
    write_json_artifact(folder / "evil.plan.json", evil)
    monkeypatch.chdir(folder)
    require_refused(capsys, folder, ["inspect", "evil.plan.json"], "evil.plan.json")
    require_refused(capsys, folder, ["pack", "demo", "--plan", "evil.plan.json"], "evil.plan.json")
    path = folder / "bundle/manifest.json"
    manifest = read_json_artifact(path, BundleManifest)
    write_json_artifact(path, manifest.model_copy(update={"plan": evil}))
    require_refused(capsys, folder, ["run", "bundle", "--prompt", "a"], "bundle/manifest.json")
    figure = QualityFigure(kl=0.1, kl_ci95=(0.1, 0.1), tokens=9)
    calibration = Calibration(
        policy="evil:rho=1",
        max_kl=0.1,
        quality=figure,
        domains={},
        sources=(),
        expert_slots=1,
        nats_per_price=1.0,
    )
    write_json_artifact(path, manifest.model_copy(update={"calibration": calibration}))
    require_refused(capsys, folder, ["run", "bundle", "--prompt", "a"], "bundle/manifest.json")
