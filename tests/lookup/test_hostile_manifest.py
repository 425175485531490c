"""A lookup bundle's manifest with any field replaced by nonsense is refused, or changes nothing."""

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_tool.cli.app import run_command
from moe_tool.errors import MoeToolError
from moe_tool.formats.lookup_bundle import LookupBundle
from moe_tool.lookup.disk_rows import checked_model, load_model
from moe_tool.lookup.pack_lookup import pack_lookup
from moe_tool.models.locate import LocatedModel
from tests.lookup.tiny_mole import make_mole

GONE = object()
NONSENSE: tuple[Any, ...] = (
    *(GONE, None, True, -1, 0, 1, 7, 2**31 - 1, 2**31, 2**63, 10**40, 0.5, 1e308),
    *("", "x", "int8", "../x", "/etc/passwd", "a\nb", "\x1b[31m", "0" * 16, "0" * 64, "x" * 5000),
    *([], {}, [None], {"x": 1}),
)
FREE = {"tool_version", "identity.name", "identity.model_type", "identity.quick", "identity.full"}
"""Fields that say where a bundle is from: any text of their kind is as good"""
IDS = torch.tensor([[1, 5, 9, 200]])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mole")
    model = make_mole(folder / "model")
    pack_lookup(LocatedModel(folder=model, name="tiny"), bits="nf4", out=folder / "bundle")
    return folder / "bundle"


def places(found: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key of an object, and the first and last entry of every list."""
    if isinstance(found, dict):
        keys: list[Any] = list(found)
    else:
        keys = sorted({0, len(found) - 1}) if isinstance(found, list) and found else []
    for key in keys:
        yield (*at, key)
        yield from places(found[key], (*at, key))


def changed(manifest: Any, at: tuple[Any, ...], value: Any) -> Any:
    found = copy.deepcopy(manifest)
    owner = found
    for key in at[:-1]:
        owner = owner[key]
    if value is GONE:
        del owner[at[-1]]
    else:
        owner[at[-1]] = value
    return found


def logits(folder: Path) -> torch.Tensor:
    model, table = load_model(LookupBundle.open(folder))
    try:
        with torch.inference_mode():
            found: torch.Tensor = model(input_ids=IDS).logits
        return found
    finally:
        table.rows.close()


def test_every_mutation_is_refused_or_harmless(bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "b"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    del manifest["sha256"]  # as a forger would
    (folder / "manifest.json").write_text(json.dumps(manifest))
    wanted = logits(folder)
    n_refused = 0
    for at in places(manifest):
        for value in NONSENSE:
            forged = changed(manifest, at, value)
            if forged == manifest and type(value) is not bool:
                continue
            (folder / "manifest.json").write_text(json.dumps(forged))
            try:
                opened = LookupBundle.open(folder)
                checked_model(opened)
            except MoeToolError as error:
                assert error.exit_code == 3 and error.hint, (at, value)
                assert "\n" not in error.message and error.message.isprintable(), (at, value)
                assert len(error.message) < 700, (at, value)
                n_refused += 1
                continue
            try:
                assert torch.equal(logits(folder), wanted), (at, value)
            except MoeToolError as error:  # a hash is compared when its tensor is read
                assert error.exit_code == 3 and "hash of" in error.message, (at, value)
                n_refused += 1
                continue
            assert ".".join(map(str, at)) in FREE or at[-1] in ("sha256", "xxh3"), (at, value)
    assert n_refused > 500


@pytest.mark.parametrize(
    ("field", "value"),
    [("vocabulary", 2**31 - 1), ("form", "F32"), ("hidden", 0), ("files", []), ("rows", None)],
)
def test_the_command_line_says_it_in_one_sentence(
    field: str, value: Any, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "b"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    del manifest["sha256"]
    (folder / "manifest.json").write_text(json.dumps(manifest | {field: value}))
    for verb in (
        ["run", str(folder), "--prompt", "ab"],
        ["evaluate", str(folder), "--data", "builtin:eval"],
        ["bench", str(folder), "--prompt-tokens", "8"],
        ["inspect", str(folder)],
    ):
        assert run_command(verb) == 3
        printed = capsys.readouterr().err
        assert "Traceback" not in printed and str(folder) in printed
        assert len(printed.strip().splitlines()) <= 3
