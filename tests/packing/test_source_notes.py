"""What pack says of a checkpoint's format before it writes."""

import shutil
from pathlib import Path

import pytest

from moe_tool.artifacts.model_names import DEMO_FOLDER
from moe_tool.errors import UsageError
from moe_tool.inspection.describe_artifact import describe_artifact
from moe_tool.models.locate import LocatedModel
from moe_tool.packing.pack_bundle import pack_bundle
from moe_tool.packing.pack_options import parse_pack_options
from moe_tool.progress import SILENT, Progress
from tests.models.stored_formats.test_coded_models import write_pair


class _Notes(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def notes_of(
    folder: Path, out: Path, bits: str, *, in_place: bool = False, tokenizer: Path | None = None
) -> list[str]:
    progress = _Notes()
    options = parse_pack_options(out=out, bits=bits, in_place=in_place)
    located = LocatedModel(folder=folder, name="tiny", tokenizer=tokenizer)
    pack_bundle(located, options, progress=progress)
    return progress.notes


@pytest.mark.parametrize(
    ("bits", "becomes", "warns"),
    [
        ("native", "codes kept (mxfp4)", False),
        ("8", "decoded and rounded to 8 bits", True),
        ("4", "decoded and rounded to 4 bits", True),
        ("3", "decoded and rounded to 3 bits", False),
    ],
)
def test_codes_are_named_and_rounding_them_in_vain_is_warned_of(
    bits: str, becomes: str, warns: bool, tmp_path: Path
) -> None:
    coded, _ = write_pair("mxfp4", tmp_path)
    first, *others = notes_of(coded, tmp_path / "b", bits)
    assert first.startswith("checkpoint: mxfp4, ") and first.endswith(f"experts: {becomes}")
    assert any("codes of 4 bits are rounded again" in note for note in others) == warns


def test_floats_and_experts_in_place_are_named(tmp_path: Path) -> None:
    coded, plain = write_pair("fp8", tmp_path)
    shutil.copy(coded / "tokenizer.json", plain)
    assert [note.partition("experts: ")[2] for note in notes_of(plain, tmp_path / "a", "4")] == [
        "rounded to 4 bits"
    ]
    (kept,) = notes_of(coded, tmp_path / "b", "native", in_place=True)
    assert kept.endswith("experts: codes kept (fp8), in the checkpoint's files")
    facts = [
        describe_artifact(folder, verify=False, progress=SILENT).facts for folder in (coded, plain)
    ]
    assert [each["format"] for each in facts] == ["fp8", "float32"]


def test_a_tokenizer_with_more_tokens_than_the_model_is_warned_of(tmp_path: Path) -> None:
    """The demo model's has 2048, this model 260, as many as its own."""
    coded, _ = write_pair("mxfp4", tmp_path)
    first, *_ = notes_of(coded, tmp_path / "a", "native", tokenizer=DEMO_FOLDER)
    assert "tokens up to 2047, the model knows 260" in first
    assert not any("the model knows" in note for note in notes_of(coded, tmp_path / "b", "native"))


def test_another_tokenizer_is_another_bundle(tmp_path: Path) -> None:
    coded, _ = write_pair("fp8", tmp_path)
    notes_of(coded, tmp_path / "b", "native", tokenizer=DEMO_FOLDER)
    with pytest.raises(UsageError, match="was packed with tokenizer"):
        notes_of(coded, tmp_path / "b", "native")
    notes_of(coded, tmp_path / "b", "native", tokenizer=DEMO_FOLDER)
