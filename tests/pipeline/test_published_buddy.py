"""Published BuddyMoE from the command line: lists, bundle and runs."""

import json
import shutil
from pathlib import Path

import pytest

from tests.pipeline.commands import Done, Pipeline, moe_tool

pytestmark = pytest.mark.slow

LISTS = ("--by", "coactivation", "--scale", "none", "--k", "2", "--alpha", "0.9")


@pytest.fixture(scope="module")
def folder(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle whose stand-ins are listed by co-activation, without scale."""
    made = tmp_path_factory.mktemp("published")
    shutil.copytree(pipeline.folder / "profiles", made / "profiles")
    for words in (("buddies", *LISTS), ("pack", pipeline.model, "--out", "bundle")):
        done = moe_tool(*words, folder=made)
        assert done.code == 0, done.stderr
    return made


def _run(folder: Path, policy: str, memory: str) -> Done:
    generate = ("--prompt", "the list", "--max-tokens", "12", "--memory", memory, "--json")
    done = moe_tool("run", "bundle", *generate, "--policy", policy, folder=folder)
    assert done.code == 0, done.stderr
    return done


def test_the_map_has_scale_1_and_frequencies(folder: Path) -> None:
    (path,) = (folder / "profiles").glob("*.buddies.json")
    layers = json.loads(path.read_text())["layers"]
    listed = [each for layer in layers for buddies in layer["buddies"] for each in buddies]
    assert listed and all(each["scale"] == 1 and 0 < each["similarity"] <= 1 for each in listed)


@pytest.mark.parametrize(("policy", "memory"), [("published", "100%"), ("published,rho=0", "50%")])
def test_with_everything_resident_or_no_substitutions_the_text_is_exact(
    folder: Path, policy: str, memory: str
) -> None:
    found, exact = _run(folder, f"buddy:{policy}", memory), _run(folder, "exact", "100%")
    assert found.fields["text"] == exact.fields["text"]
    assert found.fields["substitutions"] == 0


def test_open_gates_substitute_and_each_closed_one_does_not(folder: Path) -> None:
    opened = "buddy:published,tau=0,beta=2"
    assert _run(folder, opened, "50%").fields["substitutions"] > 0
    for closing in ("tau=1", "beta-ms=0,gb-per-s=1"):
        assert _run(folder, f"{opened},{closing}", "50%").fields["substitutions"] == 0
    _run(folder, "buddy:published,tau=-1,tau-percentile=20", "50%")  # the bundle has quantiles


def test_lists_by_output_are_refused_with_what_to_make(pipeline: Pipeline) -> None:
    done = moe_tool(
        *("run", "bundle", "--prompt", "x", "--policy", "buddy:published"), folder=pipeline.folder
    )
    assert done.code == 2 and "--by coactivation" in done.stderr
