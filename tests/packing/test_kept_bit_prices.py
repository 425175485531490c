"""Bit prices are measured once for a profile and a quantizer, and again where they do not fit."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_tool.artifacts.bit_prices import BitPrices, LayerBitPrices
from moe_tool.errors import CorruptArtifactError, NotFoundError
from moe_tool.packing import kept_bit_prices as kept
from moe_tool.progress import SILENT
from tests.formats import samples


class Measuring:
    """Stands in for the pass over the model, and counts."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.passes, self.said = folder, 0, list[str]()
        self.profile: Any = SimpleNamespace(
            path=Path("tiny.h5"),
            sha256="5" * 64,
            header=SimpleNamespace(identity=samples.IDENTITY),
        )
        monkeypatch.setattr(kept, "measure_bit_prices", self._measure)
        monkeypatch.setattr(kept, "locate_model", lambda name, **_: name)

    def _measure(self, model: object, profile: Any, quantizer: Any, **_: object) -> BitPrices:
        self.passes += 1
        return BitPrices(
            tool_version="0",
            identity=samples.IDENTITY,
            profile_sha256=profile.sha256,
            quantizer=quantizer,
            widths=(2,),
            layers=(LayerBitPrices(layer=1, eps=((0.5,),), kl_ratio=1.0),),
        )

    def ask(self, *, model: str | None = None) -> BitPrices:
        return kept.kept_bit_prices(
            self.profile,
            "gptq",
            folder=self.folder,
            model=model,
            offline=True,
            announce=self.said.append,
            progress=SILENT,
        )


@pytest.fixture
def measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measuring:
    return Measuring(tmp_path / "profiles", monkeypatch)


def _file(measuring: Measuring) -> Path:
    (path,) = measuring.folder.iterdir()
    return path


def test_prices_are_measured_once(measuring: Measuring) -> None:
    first = measuring.ask()
    assert measuring.ask() == first and measuring.passes == 1
    assert "measured with gptq" in measuring.said[-1]


def test_prices_of_another_profile_are_measured_again(measuring: Measuring) -> None:
    measuring.ask()
    measuring.profile.sha256 = "6" * 64
    assert measuring.ask().profile_sha256 == "6" * 64 and measuring.passes == 2
    assert any("of another profile" in line for line in measuring.said)


def test_prices_of_an_older_version_are_measured_again(measuring: Measuring) -> None:
    found = measuring.ask()
    path = _file(measuring)
    old = found.model_dump_json().replace('"format_version":2', '"format_version":1')
    path.write_text(old.replace('"kl_ratio"', '"felt"'))
    assert measuring.ask() == found and measuring.passes == 2
    assert any("older version" in line for line in measuring.said)


def test_damaged_prices_are_refused_and_not_measured_again(measuring: Measuring) -> None:
    measuring.ask()
    path = _file(measuring)
    path.write_text(path.read_text().replace("0.5", "0.6"))
    with pytest.raises(CorruptArtifactError):
        measuring.ask()
    assert measuring.passes == 1


def test_a_model_that_is_not_found_by_name_has_to_be_named(
    measuring: Measuring, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str, **_: object) -> None:
        raise NotFoundError(f"{name} is not there")

    monkeypatch.setattr(kept, "locate_model", missing)
    with pytest.raises(NotFoundError) as caught:
        measuring.ask()
    assert "--model PATH" in str(caught.value.hint)
    with pytest.raises(NotFoundError, match="elsewhere is not there"):
        measuring.ask(model="elsewhere")
