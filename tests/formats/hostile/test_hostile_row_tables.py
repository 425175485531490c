"""Hashes of a table's blocks that are missing, another table's or nonsense are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_tool.errors import CorruptArtifactError
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.models.locate import LocatedModel
from tests.formats.hostile.damage import json_changed
from tests.packed import pack_bundle
from tests.tiny_models import make_tiny_checkpoint

Part = dict[str, Any]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    make_tiny_checkpoint("mixtral", folder / "model", dtype="bfloat16")
    pack_bundle(LocatedModel(folder=folder / "model", name="m"), out=folder / "bundle")
    return folder / "bundle"


def change(part: Part, **fields: object) -> None:
    part.update(fields)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda part: change(part, xxh3=part["xxh3"] + "0" * 16), "hashes of"),
        (lambda part: change(part, block_bytes=4096), "hashes of"),
        (lambda part: change(part, xxh3=""), "xxh3"),
        (lambda part: change(part, xxh3=part["xxh3"][:-1]), "xxh3"),
        (lambda part: change(part, block_bytes=2**40), "block_bytes"),
        (lambda part: change(part, block_bytes=0), "block_bytes"),
        (lambda part: change(part, tensor="no.such"), "no tensor of the skeleton"),
    ],
)
def test_nonsense_is_refused_before_a_row_is_read(
    bundle: Path, tmp_path: Path, damage: Callable[[Part], None], complaint: str
) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "b"))
    json_changed(lambda parsed: damage(parsed["sections"]["row-tables"]["body"]["parts"][0]))(
        copy / "manifest.json"
    )
    with pytest.raises(CorruptArtifactError, match=complaint) as caught:
        BundleReader.open(copy)
    assert caught.value.exit_code == 3 and "\n" not in caught.value.message


def test_hashes_of_another_table_are_found_by_verify(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "b"))

    def foreign(parsed: Any) -> None:
        parsed["sections"]["row-tables"]["body"]["parts"][0]["xxh3"] = "0" * 16

    json_changed(foreign)(copy / "manifest.json")
    with BundleReader.open(copy) as reader, pytest.raises(CorruptArtifactError, match="hash of"):
        reader.verify_all()


def test_a_bundle_says_which_tables_it_hashed(bundle: Path) -> None:
    body = json.loads((bundle / "manifest.json").read_text())["sections"]["row-tables"]["body"]
    assert [part["tensor"] for part in body["parts"]] == ["model.embed_tokens.weight"]
    assert body["rows"] == "auto"
