"""Every verb given the wrong kind of thing: one sentence on what it was given and what it wants,
and a hint whose command works."""

import os
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from moe_tool.artifacts.model_names import DEMO_FOLDER
from moe_tool.cli.app import run_command
from tests.gguf_file import gguf_bytes
from tests.lookup.tiny_mole import make_mole

pytestmark = pytest.mark.slow
QUICK = {
    "profile": ("--tokens", "512", "--seq-len", "64", "--out", "made.h5"),
    "buddies": ("--out", "made.json"),
    "plan": ("--out", "made.plan.json"),
    "simulate": (),
    "pack": (),
    "run": ("--max-tokens", "2"),
    "inspect": (),
    "hardware": ("--out", "made.hardware.json"),
}
"""What is added to a hint's command so that it takes little time and leaves the artifacts alone"""
DATA = ("--data", "builtin:eval", "--tokens", "64", "--seq-len", "32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A place for a path on the command line."""

    arguments: tuple[str, ...]
    """With PATH where the path goes"""
    wanted: str
    """The words for what belongs there"""
    takes: frozenset[str]
    """Kinds that are not refused as a wrong kind"""


BUNDLE = frozenset({"bundle", "half-written"})
"""A half-written bundle is refused in words of its own"""
PROFILE = frozenset({"profile"})
MODEL = frozenset({"model", "missing"})
PLACES = {
    "profile": Place(
        arguments=("profile", "PATH", "--data", "builtin"), wanted="a checkpoint", takes=MODEL
    ),
    "profile --data": Place(
        arguments=("profile", "demo", "--data", "PATH", "--out", "x.h5"),
        wanted="text",
        takes=frozenset({"text", "empty folder", "missing"}),
    ),
    "buddies": Place(arguments=("buddies", "PATH"), wanted="a profile", takes=PROFILE),
    "simulate": Place(
        arguments=("simulate", "PATH"), wanted="a profile", takes=PROFILE | {"trace"}
    ),
    "simulate --hardware": Place(
        arguments=("simulate", "--hardware", "PATH"),
        wanted="a hardware profile",
        takes=frozenset({"hardware", "missing"}),
    ),
    "plan": Place(arguments=("plan", "PATH", "--memory", "50%"), wanted="a profile", takes=PROFILE),
    "pack": Place(arguments=("pack", "PATH", "--out", "x"), wanted="a checkpoint", takes=MODEL),
    "pack --plan": Place(
        arguments=("pack", "demo", "--plan", "PATH", "--out", "x"),
        wanted="a plan",
        takes=frozenset({"plan"}),
    ),
    "pack --profile": Place(
        arguments=("pack", "demo", "--profile", "PATH", "--out", "x"),
        wanted="a profile",
        takes=PROFILE,
    ),
    "pack --buddies": Place(
        arguments=("pack", "demo", "--buddies", "PATH", "--out", "x"),
        wanted="a buddy map",
        takes=frozenset({"buddies"}),
    ),
    "run": Place(
        arguments=("run", "PATH", "--prompt", "The list"),
        wanted="a bundle",
        takes=BUNDLE | {"lookup"},
    ),
    "evaluate": Place(
        arguments=("evaluate", "PATH", *DATA), wanted="a bundle", takes=BUNDLE | {"lookup"}
    ),
    "evaluate --reference": Place(
        arguments=("evaluate", "BUNDLE", *DATA, "--reference", "PATH"),
        wanted="a checkpoint",
        takes=MODEL,
    ),
    "calibrate": Place(
        arguments=("calibrate", "PATH", *DATA, "--max-kl", "0.1"), wanted="a bundle", takes=BUNDLE
    ),
    "bench": Place(
        arguments=("bench", "PATH", "--prompt-tokens", "16", "--generate", "0"),
        wanted="a bundle",
        takes=BUNDLE | {"lookup"},
    ),
    "inspect": Place(
        arguments=("inspect", "PATH"),
        wanted="a profile, buddy map, plan",
        takes=frozenset(
            {
                *("bundle", "lookup", "half-written", "model", "profile", "trace"),
                *("buddies", "plan", "hardware", "missing", "GGUF"),
            }
        ),
    ),
    "tune weights": Place(
        arguments=("tune", "weights", "PATH", "--model", "demo", *DATA, "--out", "x"),
        wanted="a bundle",
        takes=BUNDLE,
    ),
    "tune pruning": Place(
        arguments=("tune", "pruning", "PATH", "--data", "builtin"), wanted="a bundle", takes=BUNDLE
    ),
}
SAYS = {
    "bundle": "is a bundle,",
    "half-written": "is a half-written bundle",
    "lookup": "is a bundle of lookup experts,",
    "model": "is a checkpoint,",
    "profile": "is a profile,",
    "trace": "is the trace of a run,",
    "buddies": "is a buddy map,",
    "plan": "is a plan,",
    "hardware": "is a hardware profile,",
    "GGUF": "is a GGUF file,",
    "text": "is a text file,",
    "empty folder": "is an empty folder,",
    "empty file": "is an empty file",
    "missing": "does not exist,",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """One of each kind, made from the embedded model by the verbs; the working folder is theirs."""
    folder = tmp_path_factory.mktemp("kinds")
    before = Path.cwd()
    os.chdir(folder)
    try:
        for line in (
            "profile demo --data builtin --tokens 2048 --seq-len 64",
            "buddies --k 2",
            "hardware --shipped laptop-16gb",
            "plan --memory 50%",
            "pack demo --out packed",
            "run packed --prompt List --max-tokens 4 --memory 50% --record-trace trace.h5",
            f"pack {make_mole(folder / 'mole')} --out lookup",
        ):
            assert run_command(line.split()) == 0, line
        (folder / "m.gguf").write_bytes(gguf_bytes({"general.architecture": "llama"}, {}))
        (folder / "words.txt").write_text("the list of the items is a list. " * 400)
        (folder / "nothing.txt").touch()
        (folder / "empty").mkdir()
        shutil.copytree(folder / "packed", folder / "b.part")
        yield {
            "bundle": folder / "packed",
            "half-written": folder / "b.part",
            "lookup": folder / "lookup",
            "model": DEMO_FOLDER,
            "profile": folder / "profiles" / "demo.h5",
            "trace": folder / "trace.h5",
            "buddies": folder / "profiles" / "demo.buddies.json",
            "plan": folder / "profiles" / "demo.plan.json",
            "hardware": folder / "profiles" / "hardware.json",
            "GGUF": folder / "m.gguf",
            "text": folder / "words.txt",
            "empty folder": folder / "empty",
            "empty file": folder / "nothing.txt",
            "missing": folder / "missing",
        }
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def followed() -> dict[str, int]:
    """Exit codes of the commands that hints gave, each tried once."""
    return {}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", SAYS)
def test_what_was_given_and_wanted_is_said_with_a_way_on(
    place: str,
    kind: str,
    made: dict[str, Path],
    followed: dict[str, int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    if kind in PLACES[place].takes:
        pytest.skip("belongs there, or is refused in other words")
    given = {"PATH": str(made[kind]), "BUNDLE": str(made["bundle"])}
    code = run_command([given.get(word, word) for word in PLACES[place].arguments])
    said = capsys.readouterr().err
    assert code == 3 and "Traceback" not in said, said
    sentence, _, hint = said[said.index("error: ") :].strip().partition("\n\nhint: ")
    is_empty_text = kind == "empty file" and place == "profile --data"
    says = "it is empty" if is_empty_text else SAYS[kind]
    assert str(made[kind]) in sentence and says in sentence and "\n" not in sentence
    wanted = "the folder of a checkpoint" if PLACES[place].wanted == "a checkpoint" else None
    assert is_empty_text or (wanted or PLACES[place].wanted) in sentence, sentence
    assert hint and "\n" not in hint and "damaged" not in said and "again" not in hint
    for command in commands_in(hint):
        if command not in followed:
            shutil.rmtree("bundle", ignore_errors=True)
            words = shlex.split(command)[1:]
            followed[command] = run_command([*words, *QUICK[words[0]]])
        assert followed[command] == 0, f"{command}\n{capsys.readouterr().err}"


def commands_in(hint: str) -> list[str]:
    """Return the commands that a hint says can be typed as they stand."""
    verbs = "makes|records|reads|runs|takes|describes"
    found = re.findall(rf"(moe-tool [^;]*?) (?={verbs})", hint)
    return [each for each in found if each.split()[1] in QUICK]


def test_commands_are_found_in_hints() -> None:
    assert commands_in("moe-tool pack demo --out bundle/ makes one; moe-tool run b runs it") == [
        *("moe-tool pack demo --out bundle/", "moe-tool run b")
    ]
