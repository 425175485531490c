"""Models that are called alike: nothing of one is lost to the other, whatever verb writes it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_tool.errors import UsageError
from moe_tool.models.locate import LocatedModel
from moe_tool.profiling.recorder import record_profile
from moe_tool.text.sources import parse_sources
from tests.pipeline.commands import Done, moe_tool
from tests.tiny_models import make_tiny_checkpoint

PROFILE = ("--data", "builtin", "--tokens", "256", "--seq-len", "32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a/checkpoint-500, b/checkpoint-500 and what the first one gave."""
    made = tmp_path_factory.mktemp("alike")
    for seed, name in enumerate("ab"):
        make_tiny_checkpoint("mixtral", made / name / "checkpoint-500", seed=seed)
    for verb in (
        ("profile", "a/checkpoint-500", *PROFILE),
        ("buddies", "profiles/checkpoint-500.h5", "--k", "2"),
        ("plan", "profiles/checkpoint-500.h5", "--memory", "4GiB", "--hardware", "laptop-16gb"),
    ):
        done = moe_tool(*verb, folder=made)
        assert done.code == 0, done.stderr
    return made


def hint_of(done: Done, path: str) -> str:
    assert done.code == 2 and "Traceback" not in done.stderr, done.stderr
    assert f"{path} belongs to another model called checkpoint-500" in done.stderr
    return done.stderr.rpartition("hint: ")[2].partition(",")[0].strip()


@pytest.mark.slow
def test_the_second_of_two_models_of_one_name_replaces_nothing(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in (folder / "profiles").iterdir()}
    assert sorted(before) == [
        "checkpoint-500.buddies.json",
        "checkpoint-500.h5",
        "checkpoint-500.plan.json",
    ]

    def followed(path: str, *verb: str) -> str:
        """Run a verb, and again as its hint says; return the file that it wrote."""
        option, wanted = hint_of(moe_tool(*verb, folder=folder), path).split()
        assert option == "--out"
        done = moe_tool(*verb, option, wanted, folder=folder)
        assert done.code == 0, done.stderr
        return wanted

    profile = followed("profiles/checkpoint-500.h5", "profile", "b/checkpoint-500", *PROFILE)
    # Of the same name in another folder: the map and the plan would take the first one's names.
    (folder / "other").mkdir()
    shutil.copy(folder / profile, folder / "other" / "checkpoint-500.h5")
    second = "other/checkpoint-500.h5"
    followed("profiles/checkpoint-500.buddies.json", "buddies", second, "--k", "2")
    plan = ("plan", second, "--memory", "4GiB", "--hardware", "laptop-16gb")
    followed("profiles/checkpoint-500.plan.json", *plan)
    for name, content in before.items():
        assert (folder / "profiles" / name).read_bytes() == content
    # The same model may be measured again.
    assert moe_tool("buddies", "profiles/checkpoint-500.h5", "--k", "1", folder=folder).code == 0


def test_an_interrupted_profile_of_another_model_is_kept(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    parts = tmp_path / "p.h5.parts"
    parts.mkdir()
    (parts / "arguments.json").write_text('{"model": "another"}')
    (parts / "layer-00000.h5").write_bytes(b"hours of work")
    with pytest.raises(UsageError, match="an interrupted profile of another model"):
        record_profile(
            LocatedModel(folder=tiny_checkpoint("mixtral"), name="tiny"),
            parse_sources(["builtin"]),
            out=tmp_path / "p.h5",
            tokens=256,
            seq_len=32,
        )
    assert (parts / "layer-00000.h5").read_bytes() == b"hours of work"
