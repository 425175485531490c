"""One finished pipeline that the tests look at."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pipeline.commands import Done, Pipeline, moe_tool


@pytest.fixture(scope="session")
def pipeline(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[..., Path]
) -> Pipeline:
    """Profile, buddies, pack, run and evaluate with --json on a tiny model, once."""
    folder = tmp_path_factory.mktemp("pipeline")
    model = tiny_checkpoint("mixtral")
    (folder / "words.txt").write_text("the list of the items is a list of words. " * 400)

    def verb(*arguments: str | Path) -> Done:
        done = moe_tool(*arguments, "--json", folder=folder)
        assert done.code == 0, f"{arguments}:\n{done.stderr}\n{done.stdout}"
        return done

    data = ("--data", "words=./words.txt", "--seq-len", "32")
    return Pipeline(
        folder=folder,
        model=model,
        profile=verb("profile", model, *data, "--tokens", "1024"),
        buddies=verb("buddies", "--k", "2"),
        pack=verb("pack", model, "--out", "bundle"),
        run=verb("run", "bundle", "--prompt", "the list", "--max-tokens", "8", "--memory", "min"),
        evaluate=verb(
            *("evaluate", "bundle", *data, "--tokens", "256", "--memory", "50%"),
            *("--policy", "buddy", "--controls"),
        ),
    )
