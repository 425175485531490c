"""Named sections: kept where they are optional, refused by name where they are required."""

import json
from pathlib import Path

import pytest
from pydantic import Field

from moe_tool.artifacts import bundle_sections
from moe_tool.artifacts.bundle_sections import Section
from moe_tool.artifacts.schema import FrozenModel
from moe_tool.errors import ArtifactVersionError, CorruptArtifactError
from moe_tool.formats.bundle_files import MANIFEST
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.formats.json_artifact import write_json_artifact
from tests.formats.small_bundle import write_bundle

BODY = {"rows": [[1, 2.5], [3, None]], "note": "of a later version"}


class Predictor(FrozenModel):
    """A section that a later version knows."""

    rate: float = Field(gt=0)


def with_section(folder: Path, section: object, name: str = "predictor") -> Path:
    """Put a section into a bundle."""
    path = folder / MANIFEST
    parsed = json.loads(path.read_text())
    parsed["sections"][name] = section
    parsed.pop("sha256", None)
    path.write_text(json.dumps(parsed))
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


def test_an_unknown_optional_section_is_ignored_and_kept(bundle: Path) -> None:
    with_section(bundle, {"required": False, "body": BODY})
    with BundleReader.open(bundle) as reader:
        reader.verify_all()
        manifest = reader.manifest
    write_json_artifact(bundle / MANIFEST, manifest)  # as whoever changes another part of it does
    with BundleReader.open(bundle) as reader:
        assert reader.manifest.sections == {"predictor": Section(required=False, body=BODY)}


def test_an_unknown_required_section_is_refused_by_name(bundle: Path) -> None:
    with_section(bundle, {"required": True, "body": BODY})
    with pytest.raises(ArtifactVersionError, match="'predictor'") as error:
        BundleReader.open(bundle)
    assert error.value.exit_code == 3
    assert "moe-tool pack" in str(error.value.hint) and "\n" not in error.value.message


def test_a_known_section_is_read_and_its_schema_kept(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(bundle_sections.SECTIONS, "predictor", Predictor)
    with_section(bundle, {"required": True, "body": {"rate": 0.5}})
    with BundleReader.open(bundle) as reader:
        section = reader.manifest.sections["predictor"]
    assert bundle_sections.parse_section("predictor", section) == Predictor(rate=0.5)
    with_section(bundle, {"required": True, "body": {"rate": -1}})
    with pytest.raises(CorruptArtifactError, match=r"predictor\.rate: Input should be greater"):
        BundleReader.open(bundle)


@pytest.mark.parametrize(
    ("section", "name", "says"),
    [
        ({"required": False}, "x", r"sections\.x\.body"),
        ({"required": 1, "body": {}}, "x", r"sections\.x\.required"),
        ({"required": False, "body": []}, "x", r"sections\.x\.body"),
        ({"required": False, "body": {}, "more": 1}, "x", r"sections\.x\.more"),
        ({"required": False, "body": {}}, "Not a name", "sections"),
    ],
)
def test_what_is_no_section_is_refused(section: object, name: str, says: str, bundle: Path) -> None:
    with_section(bundle, section, name)
    with pytest.raises(CorruptArtifactError, match=says):
        BundleReader.open(bundle)


def test_a_bundle_of_version_two_says_how_to_pack_again(bundle: Path) -> None:
    path = bundle / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))
    with pytest.raises(ArtifactVersionError, match="has format version '2', wanted 3") as error:
        BundleReader.open(bundle)
    assert error.value.exit_code == 3 and "\n" not in error.value.message
    assert error.value.hint == "make it again with moe-tool pack, once its folder is removed"
