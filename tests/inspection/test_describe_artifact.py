"""Descriptions: a kind for each artifact, facts from headers, and nothing left open."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_tool.errors import CorruptArtifactError, NotFoundError
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.formats.json_artifact import write_json_artifact
from moe_tool.hardware.shipped import shipped_profile
from moe_tool.inspection.describe_artifact import describe_artifact
from moe_tool.inspection.description import Description
from moe_tool.models.locate import LocatedModel
from moe_tool.progress import SILENT
from moe_tool.reports.description_tables import tables_of
from tests.formats.made_mask_router import LEARNED, put_mask_router
from tests.packed import pack_bundle


def describe(path: Path, *, verify: bool = False) -> Description:
    return describe_artifact(path, verify=verify, progress=SILENT)


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("described") / "bundle"
    pack_bundle(LocatedModel(folder=tiny_checkpoint("mixtral"), name="tiny"), out=out, bits="8")
    return out


@pytest.mark.parametrize("verify", [False, True])
def test_a_bundle_is_described_and_closed(
    bundle: Path, verify: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []  # so that nothing is closed by being forgotten
    open_bundle = BundleReader.open
    monkeypatch.setattr(
        BundleReader, "open", lambda *given: kept.append(open_bundle(*given)) or kept[-1]
    )
    found = describe(bundle, verify=verify)
    assert (found.kind, found.is_intact) == ("bundle", True)
    assert found.checked == ("every hash" if verify else "sizes and headers")
    assert found.facts["model"] == "tiny" and found.facts["bits"] == "8"
    assert found.facts["policy"] == "exact" and found.facts["replicas"] == "none"
    files = [file for file in bundle.iterdir() if file.name != "manifest.json"]
    assert found.facts["bytes"] == sum(file.stat().st_size for file in files)
    assert tables_of(found.tabled) == ()
    handles = Path("/proc/self/fd")
    assert len(kept) == 1
    assert not [one for one in os.listdir(handles) if str(bundle) in _target(handles / one)]


def test_learned_routers_are_named(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    put_mask_router(copy)
    found = describe(copy)
    assert found.facts["pruning"] == f"trained to drop {LEARNED.rate:.0%} of the chosen experts"
    assert found.details["sections"]["mask-router"]["body"]["rate"] == LEARNED.rate


def _target(handle: Path) -> str:
    try:
        return os.readlink(handle)
    except OSError:  # the listing's own
        return ""


def test_the_manifest_and_the_folder_are_the_same_bundle(bundle: Path) -> None:
    assert describe(bundle / "manifest.json").facts == describe(bundle).facts


def test_what_was_never_finished_is_said_so_with_its_remedy(tmp_path: Path) -> None:
    for name, remedy in (("b.part", "moe-tool pack"), ("p.h5.parts", "--resume")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "some").write_bytes(bytes(7))
        found = describe(tmp_path / name)
        assert not found.is_intact and remedy in found.checked and found.facts == {"bytes": 7}
        assert found.to_json()["intact"] is False


def test_a_checkpoint_is_told_by_its_config(tiny_checkpoint: Callable[..., Path]) -> None:
    found = describe(tiny_checkpoint("mixtral"))
    assert found.kind == "checkpoint" and found.facts["model_type"] == "mixtral"


def test_a_machine_has_its_measurements_in_json_and_as_tables(tmp_path: Path) -> None:
    profile = shipped_profile("laptop-16gb")
    write_json_artifact(tmp_path / "h.json", profile)
    found = describe(tmp_path / "h.json")
    fields = found.to_json()
    assert fields["kind"] == "hardware profile" and fields["cores"] == profile.cores
    assert fields["disk"] == profile.model_dump(mode="json")["disk"]
    assert fields["layer_warm_s"] == profile.layer_warm_s
    assert len(tables_of(found.tabled)) == 2 + bool(profile.lookup)


def test_what_is_nothing_that_we_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        describe(tmp_path / "nowhere")
    (tmp_path / "a.txt").write_text("?")
    (tmp_path / "a.json").write_text('{"kind": "other"}')
    for path in (tmp_path, tmp_path / "a.txt", tmp_path / "a.json"):
        with pytest.raises(CorruptArtifactError, match="not a profile, buddy map, plan"):
            describe(path)
