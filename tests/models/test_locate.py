"""Models are found where they are, and told missing at once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_tool.artifacts.identity import HubRevision
from moe_tool.artifacts.model_names import ALIASES
from moe_tool.errors import NotFoundError
from moe_tool.models import locate
from moe_tool.models.locate import LocatedModel, locate_model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache, and a hub that does not answer."""
    folder = tmp_path / "hub-cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(locate, "hub_is_reachable", lambda: False)
    monkeypatch.chdir(tmp_path)
    return folder


def add_snapshot(cache: Path, hub_id: str, revision: str, *files: str) -> Path:
    folder = cache / f"models--{hub_id.replace('/', '--')}" / "snapshots" / revision
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).write_text("{}")
    return folder


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    found = locate_model(str(tmp_path))
    assert found == LocatedModel(folder=tmp_path, name=tmp_path.name)


def test_a_folder_goes_before_an_alias_of_its_name(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "mixtral").mkdir()
    (tmp_path / "mixtral" / "config.json").touch()
    assert locate_model("mixtral").folder == Path("mixtral")


def test_a_cached_snapshot_is_taken_without_network(cache: Path) -> None:
    folder = add_snapshot(
        cache, ALIASES["mixtral"], "abc", "config.json", "tokenizer.json", "model.safetensors"
    )
    hub = HubRevision(hub_id=ALIASES["mixtral"], commit="abc")
    assert locate_model("mixtral") == LocatedModel(folder=folder, name="mixtral", hub=hub)
    assert locate_model(ALIASES["mixtral"], offline=True).folder == folder


def test_the_snapshot_of_main_goes_before_newer_ones(cache: Path) -> None:
    wanted = add_snapshot(cache, "a/b", "old", "config.json", "tokenizer.json", "model.safetensors")
    add_snapshot(cache, "a/b", "new", "config.json", "tokenizer.json", "model.safetensors")
    references = cache / "models--a--b" / "refs"
    references.mkdir()
    (references / "main").write_text("old\n")
    assert locate_model("a/b").folder == wanted


def test_a_snapshot_with_a_missing_shard_is_not_taken(cache: Path) -> None:
    folder = add_snapshot(cache, "a/b", "abc", "config.json", "tokenizer.json", "one.safetensors")
    index = {"weight_map": {"x": "one.safetensors", "y": "two.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(NotFoundError):
        locate_model("a/b")
    (folder / "two.safetensors").touch()
    assert locate_model("a/b").folder == folder


def test_a_missing_model_names_folder_cache_and_both_ways_out(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        locate_model("mixtral")
    assert "mistralai/Mixtral-8x7B-v0.1" in caught.value.message
    assert str(tmp_path / "mixtral") in caught.value.message
    assert str(cache) in caught.value.message
    assert caught.value.hint is not None
    assert "local folder" in caught.value.hint
    assert "network" in caught.value.hint


def test_offline_never_asks_the_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> bool:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(locate, "hub_is_reachable", asked)
    with pytest.raises(NotFoundError, match="--offline forbids the network") as found:
        locate_model("mixtral", offline=True)
    assert "leave out --offline" in (found.value.hint or "")


@pytest.mark.parametrize(
    "name", ["./nope", "/no/such/folder", "nope", "a/b/c", "../../etc", "a b/c", ""]
)
def test_what_can_be_no_hub_id_is_told_so(name: str, cache: Path) -> None:
    if name == "":
        name = "no-such-alias"
    with pytest.raises(NotFoundError, match="is no folder, no hub id"):
        locate_model(name)


def test_every_alias_is_a_hub_id_or_an_absolute_folder() -> None:
    for target in ALIASES.values():
        assert Path(target).is_absolute() or target.count("/") == 1


def test_the_answer_without_network_takes_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from moe_tool.errors import NotFoundError\n"
        "from moe_tool.models.locate import locate_model\n"
        "try:\n"
        "    locate_model('mixtral')\n"
        "except NotFoundError:\n"
        "    print(sorted({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_home_folder_of_nobody_is_a_folder_that_is_not_there(cache: Path) -> None:
    with pytest.raises(NotFoundError, match="~nosuchuser-/m is no"):
        locate_model("~nosuchuser-/m", offline=True)
