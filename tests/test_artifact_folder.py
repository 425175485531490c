"""The newest artifact that fits is taken, and nothing else."""

import os
from pathlib import Path

from moe_tool.artifact_folder import (
    BUDDIES_SUFFIX,
    PROFILE_SUFFIX,
    buddies_path,
    newest_artifact,
    profile_path,
)


def make(folder: Path, name: str, *, age_s: int) -> Path:
    path = folder / name
    path.write_bytes(b"")
    os.utime(path, (1_000_000 - age_s, 1_000_000 - age_s))
    return path


def test_the_newest_file_of_the_kind_is_taken(tmp_path: Path) -> None:
    make(tmp_path, "old.h5", age_s=20)
    newest = make(tmp_path, "new.h5", age_s=10)
    make(tmp_path, "newer.buddies.json", age_s=5)
    make(tmp_path, ".newest.h5", age_s=1)
    (tmp_path / "folder.h5").mkdir()
    assert newest_artifact(tmp_path, PROFILE_SUFFIX) == newest


def test_a_newer_file_that_does_not_fit_is_passed_over(tmp_path: Path) -> None:
    fitting = make(tmp_path, "a.h5", age_s=20)
    make(tmp_path, "b.h5", age_s=10)
    assert newest_artifact(tmp_path, PROFILE_SUFFIX, fits=lambda p: p.name == "a.h5") == fitting


def test_nothing_is_found_in_an_empty_or_missing_folder(tmp_path: Path) -> None:
    assert newest_artifact(tmp_path, BUDDIES_SUFFIX) is None
    assert newest_artifact(tmp_path / "missing", BUDDIES_SUFFIX) is None


def test_names_of_models_become_file_names(tmp_path: Path) -> None:
    assert profile_path(tmp_path, "demo") == tmp_path / "demo.h5"
    assert (
        profile_path(tmp_path, "mistralai/Mixtral-8x7B") == tmp_path / "mistralai--Mixtral-8x7B.h5"
    )
    assert profile_path(tmp_path, "../../etc") == tmp_path / "etc.h5"
    assert profile_path(tmp_path, "..") == tmp_path / "model.h5"
    assert profile_path(tmp_path, "模型") == tmp_path / "模型.h5"
    assert profile_path(tmp_path, "专家 2") == tmp_path / "专家--2.h5"
    assert buddies_path(tmp_path, Path("elsewhere/demo.h5")) == tmp_path / "demo.buddies.json"
