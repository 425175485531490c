"""Downloaded shards are deleted while they are packed, and a pack goes on without them."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from moe_tool.errors import MoeToolError, NotFoundError, UsageError
from moe_tool.formats.bundle_writer import BundleWriter
from moe_tool.formats.discarded_source import read_discarded
from moe_tool.models import locate
from moe_tool.models.architecture import open_model
from moe_tool.models.locate import LocatedModel, locate_model
from moe_tool.packing.pack_bundle import pack_opened
from moe_tool.packing.pack_options import parse_pack_options
from moe_tool.packing.write_bundle import PackReport
from tests.models.local_hub import MODEL, local_hub
from tests.models.stored_formats.test_coded_models import write_pair
from tests.packed import pack_bundle
from tests.tiny_models import make_tiny_checkpoint


class Killed(BaseException):
    """Nothing on the way may catch it."""


class Hub:
    """A hub on localhost, a cache, and what was fetched."""

    def __init__(self, cache: Path, fetched: list[str]) -> None:
        self.cache, self.fetched = cache, fetched

    def pack(self, out: Path, *, offline: bool = False, **options: Any) -> PackReport:
        """Pack as the command line does."""
        gone = read_discarded(out)
        model = locate_model(MODEL, offline=offline, gone=gone)
        opened = open_model(model)
        with opened.checkpoint:
            return pack_opened(
                opened,
                model.folder,
                parse_pack_options(out=out, discard_source=True, **options),
                hub=model.hub,
                offline=offline,
            )

    def shards(self) -> set[str]:
        """Names of the weight files that are in the cache."""
        return {path.name for path in self.cache.rglob("*.safetensors") if path.is_file()}

    def blob_bytes(self) -> int:
        return sum(p.stat().st_size for p in self.cache.rglob("blobs/*") if p.is_file())

    def weights_fetched(self) -> list[str]:
        names = [name for name in self.fetched if name.endswith(".safetensors")]
        self.fetched.clear()
        return names


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    return make_tiny_checkpoint("mixtral", folder, dtype="bfloat16", max_shard_size="60KB")


@pytest.fixture(scope="module")
def whole(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle without the option."""
    model = LocatedModel(folder=repository, name=MODEL)
    return pack_bundle(model, out=tmp_path_factory.mktemp("whole") / "b").bundle


@contextmanager
def serving(repository: Path, cache: Path, patched: pytest.MonkeyPatch) -> Iterator[Hub]:
    with local_hub(repository) as (endpoint, fetched):
        patched.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        patched.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        )
        patched.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        patched.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        patched.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        patched.setattr(locate, "hub_is_reachable", lambda: True)
        yield Hub(cache, fetched)


@pytest.fixture
def hub(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr("moe_tool.formats.bundle_writer._SYNC_BYTES", 1)
    with serving(repository, tmp_path / "cache", monkeypatch) as found:
        yield found


def kill_after(count: int, patched: pytest.MonkeyPatch) -> None:
    write = BundleWriter.write_record

    def killing(self: BundleWriter, *args: Any, **more: Any) -> None:
        if self.n_written == count:
            raise Killed
        write(self, *args, **more)

    patched.setattr(BundleWriter, "write_record", killing)
    patched.setattr(BundleWriter, "suspend", lambda _: None)  # a kill leaves no time to sync


def require_equal(found: Path, wanted: Path) -> None:
    names = {path.name for path in found.iterdir()}
    assert names == {path.name for path in wanted.iterdir()}
    for name in names:
        assert (found / name).read_bytes() == (wanted / name).read_bytes(), name


def test_every_shard_is_freed_and_the_bundle_is_the_same(
    hub: Hub, whole: Path, tmp_path: Path
) -> None:
    locate_model(MODEL)
    shards, before = hub.shards(), hub.blob_bytes()
    assert len(shards) > 4
    report = hub.pack(tmp_path / "b")
    require_equal(report.bundle, whole)
    assert report.freed is not None and report.freed.keys() == shards
    assert hub.shards() == set()
    assert hub.blob_bytes() == before - sum(report.freed.values())
    assert report.proof is not None and report.proof.rule == "equal"


@pytest.mark.parametrize("after", [0, 1, 11, 23])
def test_a_killed_pack_goes_on_without_the_shards(
    after: int, hub: Hub, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locate_model(MODEL)
    shards = hub.shards()
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_after(after, patched)
        hub.pack(tmp_path / "b")
    left = hub.shards()
    assert left and left < shards  # those with nothing but skeleton are gone already
    hub.fetched.clear()
    report = hub.pack(tmp_path / "b", offline=True)
    assert hub.fetched == []
    assert report.resumed_records == after
    require_equal(report.bundle, whole)
    assert report.freed is not None and report.freed.keys() == shards
    assert hub.shards() == set()


def test_a_pack_killed_before_its_proof_goes_on(
    hub: Hub, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(BundleWriter, "finish", kill)
        hub.pack(tmp_path / "b")
    assert hub.shards() == set()
    require_equal(hub.pack(tmp_path / "b", offline=True).bundle, whole)


def test_a_killed_coded_pack_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All experts of gpt-oss lie in one file: nothing of it is freed before the last record."""
    coded = write_pair("mxfp4", tmp_path)[0]
    wanted = pack_bundle(LocatedModel(folder=coded, name=MODEL), out=tmp_path / "whole").bundle
    with serving(coded, tmp_path / "cache", monkeypatch) as hub:
        with monkeypatch.context() as patched, pytest.raises(Killed):
            kill_after(5, patched)
            hub.pack(tmp_path / "b")
        assert hub.shards() == {"model.safetensors"}
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(BundleWriter, "finish", lambda *_, **__: (_ for _ in ()).throw(Killed))
            hub.pack(tmp_path / "b", offline=True)
        assert hub.shards() == set()
        require_equal(hub.pack(tmp_path / "b", offline=True).bundle, wanted)


def test_only_shards_that_are_needed_again_are_downloaded_again(
    hub: Hub, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_after(11, patched)
        hub.pack(tmp_path / "b")
    part, gone = tmp_path / "b.part", read_discarded(tmp_path / "b")
    assert gone is not None and len(gone.state.freed) > 1
    records = part / "experts-00001.safetensors"
    first_record = json.loads((part / "journal.jsonl").read_bytes().splitlines()[11])["offset"]
    data = bytearray(records.read_bytes())
    data[first_record] ^= 1  # the last record that was written
    records.write_bytes(data)
    hub.weights_fetched()
    report = hub.pack(tmp_path / "b")
    assert report.resumed_records == 10
    fetched = hub.weights_fetched()
    assert len(fetched) == len(set(fetched)) and set(fetched) < set(gone.state.freed)
    require_equal(report.bundle, whole)


def test_a_needed_shard_that_cannot_be_fetched_is_named(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_after(11, patched)
        hub.pack(tmp_path / "b")
    (tmp_path / "b.part" / "experts-00001.safetensors").unlink()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}",
    )
    with pytest.raises(NotFoundError, match="could not be downloaded"):
        hub.pack(tmp_path / "b")
    with pytest.raises(NotFoundError, match="was deleted once it was packed") as found:
        hub.pack(tmp_path / "b", offline=True)
    assert "without --offline" in str(found.value.hint)


def test_blobs_of_another_revision_stay(hub: Hub, tmp_path: Path) -> None:
    folder = locate_model(MODEL).folder
    other = folder.parent / ("d" * 40)
    other.mkdir()
    name = sorted(path.name for path in folder.glob("*.safetensors"))[0]
    os.symlink(os.readlink(folder / name), other / name)
    report = hub.pack(tmp_path / "b")
    assert hub.shards() == {name} and (other / name).is_file()
    assert report.freed is not None and name not in report.freed


@pytest.mark.parametrize("state", ["{", '{"hub_id": 1}', ""])
def test_a_damaged_state_is_refused(
    state: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_after(1, patched)
        hub.pack(tmp_path / "b")
    (tmp_path / "b.part" / ".source" / "state.json").write_text(state)
    with pytest.raises(MoeToolError, match=r"state\.json is damaged") as found:
        hub.pack(tmp_path / "b")
    assert found.value.exit_code == 3 and "remove" in str(found.value.hint)


def test_local_folders_finished_bundles_and_in_place_are_refused(
    hub: Hub, repository: Path, whole: Path, tmp_path: Path
) -> None:
    model = LocatedModel(folder=repository, name="tiny")
    with pytest.raises(UsageError, match="beside a local folder"):
        pack_bundle(model, out=tmp_path / "b", discard_source=True)
    with pytest.raises(UsageError, match="beside --in-place"):
        pack_bundle(model, out=tmp_path / "b", discard_source=True, in_place=True)
    with pytest.raises(UsageError, match="is finished"):
        hub.pack(whole)
    assert hub.fetched == []


def test_the_disk_has_to_hold_only_what_is_not_freed_in_time(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr("moe_tool.packing.discard_source._SYNC_BYTES", 0)
    monkeypatch.setattr(
        "moe_tool.packing.discard_source.require_free_disk", lambda _, size: asked.append(size)
    )
    report = hub.pack(tmp_path / "b")
    assert len(asked) == 1
    assert report.skeleton_bytes <= asked[0] < report.skeleton_bytes + report.expert_bytes


def test_links_to_elsewhere_are_left_alone(hub: Hub, tmp_path: Path) -> None:
    folder = locate_model(MODEL).folder
    path = sorted(folder.glob("*.safetensors"))[0]
    elsewhere = path.resolve().rename(tmp_path / "mine")
    path.unlink()
    path.symlink_to(elsewhere)
    report = hub.pack(tmp_path / "b")
    assert elsewhere.is_file() and report.freed is not None and path.name not in report.freed
