"""A buddy map says by which rules it was made; maps of earlier versions are read."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_tool.artifacts.buddy_map import BuddyMap
from moe_tool.buddies.build_buddy_map import build_buddy_map
from moe_tool.buddies.list_rules import ListRules
from moe_tool.cli.app import run_command
from moe_tool.formats.json_artifact import read_json_artifact, write_json_artifact
from tests.buddies.made_profile import made_profile

RULES = ListRules(
    alpha=0.8,
    alpha_by_layer={1: 0.5},
    weighted=True,
    smoothing=2,
    warm_up=3,
    warm_up_weight=0.25,
    scale="none",
)


def made(**options: object) -> BuddyMap:
    outputs = torch.eye(3)[:, None].expand(-1, 16, -1).contiguous()
    index = np.tile(np.arange(3), (16, 1))
    profile = made_profile(outputs, index, np.full((16, 3), 1 / 3))
    return build_buddy_map(profile, k=2, **options)  # type: ignore[arg-type]


def inspected(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    assert run_command(["inspect", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def test_a_map_keeps_every_rule_and_inspect_shows_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.buddies.json"
    write_json_artifact(path, made(by="coactivation", rules=RULES))
    kept = read_json_artifact(path, BuddyMap).rules
    assert kept is not None and kept.model_dump() == {
        "alpha": 0.8,
        "alpha_by_layer": ((1, 0.5),),
        "weighted": True,
        "smoothing": 2.0,
        "warm_up": 3,
        "warm_up_weight": 0.25,
        "scale": "none",
    }
    shown = inspected(path, capsys)
    assert (shown["by"], shown["alpha"], shown["alpha_by_layer"]) == ("coactivation", 0.8, "1=0.5")
    assert (shown["weighted"], shown["smoothing"], shown["scale"]) == (True, 2.0, "none")
    assert (shown["warm_up"], shown["warm_up_weight"]) == (3, 0.25)


def test_lists_by_another_measure_show_only_what_applies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.buddies.json"
    write_json_artifact(path, made(by="output"))
    shown = inspected(path, capsys)
    assert shown["scale"] == "fitted" and "alpha" not in shown


def test_a_map_of_an_earlier_version_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.buddies.json"
    fields = json.loads(made().model_dump_json())
    del fields["rules"]
    path.write_text(json.dumps(fields))
    assert read_json_artifact(path, BuddyMap).rules is None
    assert "scale" not in inspected(path, capsys)
