"""`profile --add` as a user types it: what it adds, and mistakes that change nothing."""

import shutil
from pathlib import Path

import pytest

from tests.pipeline.commands import Done, Pipeline, moe_tool
from tests.pipeline.test_mistakes import refused

pytestmark = pytest.mark.slow

OTHER = ("--add", "more=./more.txt", "--tokens", "64")


@pytest.fixture
def profile(pipeline: Pipeline, tmp_path: Path) -> Path:
    """A copy of the pipeline's profile, beside other text."""
    (tmp_path / "more.txt").write_text("some words of a text that is not a list at all. " * 200)
    return Path(
        shutil.copy(pipeline.folder / pipeline.profile.fields["profile"], tmp_path / "p.h5")
    )


def widen(pipeline: Pipeline, profile: Path, *arguments: str | Path) -> Done:
    return moe_tool("profile", pipeline.model, "--out", profile, *arguments, folder=profile.parent)


def test_new_text_and_more_of_a_domain_are_added(pipeline: Pipeline, profile: Path) -> None:
    done = widen(pipeline, profile, *OTHER, "--json")
    assert done.code == 0, done.stderr
    assert done.fields["domains"] == ["words", "more"]
    assert done.fields["added"]["tokens"] == 64 and done.fields["tokens"] == 1024 + 64
    (profile.parent / "more.txt").write_text("yet another text about the items of a list. " * 200)
    # The domain's tokens are apart now: the other one's lie between them.
    done = widen(pipeline, profile, "--add", "words=./more.txt", "--tokens", "64", "--json")
    assert done.code == 0, done.stderr
    assert done.fields["domains"] == ["words", "more"] and done.fields["tokens"] == 1024 + 128
    assert moe_tool("inspect", profile, "--verify", folder=profile.parent).code == 0
    assert moe_tool("buddies", profile, "--k", "1", folder=profile.parent).code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, "no text source"),
        ((*OTHER, "--data", "x=./more.txt"), 2, "either --data or --add"),
        ((*OTHER, "--seq-len", "64"), 2, "--seq-len cannot be changed"),
        ((*OTHER, "--seed", "1"), 2, "--seed cannot be changed"),
        ((*OTHER, "--holdout", "0.5"), 2, "--holdout cannot be changed"),
        ((*OTHER, "--memory", "1MiB"), 4, "1.00 MiB"),
        (("--add", "more=./missing.txt"), 3, "missing.txt"),
        ((*OTHER, "--add", "more=./words.txt"), 2, "two text sources are called"),
    ],
)
def test_mistakes_leave_the_profile_as_it_was(
    pipeline: Pipeline, profile: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    before = profile.read_bytes()
    refused(widen(pipeline, profile, *arguments), code, words)
    assert profile.read_bytes() == before


def test_text_that_the_profile_has_is_refused_by_any_name(
    pipeline: Pipeline, profile: Path
) -> None:
    before = profile.read_bytes()
    shutil.copy(pipeline.folder / "words.txt", profile.parent / "renamed.txt")
    done = widen(pipeline, profile, "--add", "new=./renamed.txt", "--tokens", "64")
    refused(done, 2, "has the text new=./renamed.txt already")
    assert profile.read_bytes() == before


def test_there_must_be_an_intact_profile(pipeline: Pipeline, profile: Path) -> None:
    refused(widen(pipeline, profile.with_name("none.h5"), *OTHER), 3, "none.h5 does not exist")
    torn = profile.read_bytes()[:-1000]
    profile.write_bytes(torn)
    refused(widen(pipeline, profile, *OTHER), 3, "p.h5 is damaged")
    assert profile.read_bytes() == torn


def test_a_folder_of_other_files_in_the_way_is_left_alone(
    pipeline: Pipeline, profile: Path
) -> None:
    before = profile.read_bytes()
    mine = profile.with_name("p.h5.add.parts") / "mine"
    mine.parent.mkdir()
    mine.write_text("not yours")
    refused(widen(pipeline, profile, *OTHER), 2, "p.h5.add.parts is in the way")
    assert mine.read_text() == "not yours" and profile.read_bytes() == before
