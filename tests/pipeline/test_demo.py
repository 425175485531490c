"""The demo goes through the whole pipeline on the embedded model."""

from pathlib import Path

import pytest

from tests.pipeline.commands import moe_tool


@pytest.mark.slow
def test_the_demo_runs_every_stage_and_exact_is_exact(tmp_path: Path) -> None:
    done = moe_tool("demo", "--out", "kept", "--json", folder=tmp_path)
    assert done.code == 0, done.stderr
    assert done.fields["exact"] is True
    assert {"profile", "buddies", "pack", "evaluate"} <= done.fields["stages"].keys()
    assert (tmp_path / "kept" / "bundle" / "manifest.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
