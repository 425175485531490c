"""A download is judged before any weight is fetched, and fetches what the index names."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_tool.errors import (
    CorruptArtifactError,
    MoeToolError,
    NotFoundError,
    UnsupportedModelError,
)
from moe_tool.models import locate
from moe_tool.models.locate import locate_model
from tests.models.local_hub import COMMIT, MODEL, local_hub
from tests.tiny_models import make_tiny_checkpoint


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return make_tiny_checkpoint("gpt_oss", tmp_path / "repository", max_shard_size="300KB")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(locate, "hub_is_reachable", lambda: True)
    monkeypatch.chdir(tmp_path)
    return folder


def fetch(
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str = MODEL,
    *,
    hub: Mapping[str, Any] | None = None,
    **options: object,
) -> tuple[list[str], list[str], MoeToolError | Path]:
    """Locate MODEL on a hub; return the files fetched, the lines said, and folder or error."""
    lines: list[str] = []
    with local_hub(repository, **(hub or {})) as (endpoint, fetched):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        )
        try:
            found = locate_model(name, announce=lines.append, **options)  # type: ignore[arg-type]
        except MoeToolError as error:
            return fetched, lines, error
    return fetched, lines, found.folder


def weights(fetched: list[str]) -> list[str]:
    return [name for name in fetched if name.endswith(".safetensors")]


def edit_json(path: Path, **changed: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def test_small_files_come_first_then_headers_then_the_shards_of_the_index(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = sorted(path.name for path in repository.glob("model-*.safetensors"))
    assert len(shards) > 1
    shutil.copy(repository / shards[0], repository / "consolidated.safetensors")
    fetched, lines, folder = fetch(repository, monkeypatch)
    assert isinstance(folder, Path)
    assert sorted(weights(fetched)) == shards
    headers = [n for n, name in enumerate(fetched) if " bytes=" in name]
    first_weight = min(n for n, name in enumerate(fetched) if name in shards)
    assert headers and max(headers) < first_weight
    assert fetched.index("config.json") < min(headers)
    assert lines[-1] == f"{MODEL}: revision {COMMIT}"
    assert any(line.startswith(f"downloading {MODEL}: ") for line in lines)
    assert {path.name for path in folder.glob("*.safetensors")} == set(shards)


def test_a_cached_revision_is_taken_without_the_hub_and_said(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, folder = fetch(repository, monkeypatch)
    for name, revision in ((MODEL, None), (MODEL, COMMIT), (f"{MODEL}@{COMMIT[:8]}", None)):
        lines: list[str] = []
        found = locate_model(name, revision=revision, offline=True, announce=lines.append)
        assert found.folder == folder
        assert found.name == MODEL
        assert lines == [f"{MODEL}: revision {COMMIT}"]


def test_a_revision_that_is_not_here_is_not_replaced_by_another(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch(repository, monkeypatch)
    with pytest.raises(NotFoundError):
        locate_model(f"{MODEL}@v2", offline=True)


def unknown_quantization(folder: Path) -> None:
    edit_json(folder / "config.json", quantization_config={"quant_method": "no-such-format"})


def unknown_type(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="no_such_type")


def tokenizer_with_code(folder: Path) -> None:
    edit_json(
        folder / "tokenizer_config.json",
        tokenizer_class="NoSuchTokenizer",
        auto_map={"AutoTokenizer": ["x.T", None]},
    )


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def bad_settings(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"top_k": "many"}')


def a_shard_fewer(folder: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[0].unlink()


def another_width(folder: Path) -> None:
    edit_json(folder / "config.json", intermediate_size=40)


def no_safetensors(folder: Path) -> None:
    for path in folder.glob("*safetensors*"):
        path.unlink()
    (folder / "config.json").unlink()
    for kind in ("Q4_K_M", "Q8_0"):
        (folder / f"m-{kind}.gguf").write_bytes(b"GGUF")


@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        (unknown_quantization, UnsupportedModelError, "no-such-format"),
        (unknown_type, UnsupportedModelError, "no_such_type"),
        (tokenizer_with_code, UnsupportedModelError, "Python code"),
        (no_tokenizer, NotFoundError, "holds no tokenizer"),
        (bad_settings, CorruptArtifactError, "top_k"),
        (a_shard_fewer, CorruptArtifactError, "lacks the shard"),
        (another_width, CorruptArtifactError, "does not fit the model"),
        (no_safetensors, UnsupportedModelError, "only: m-Q4_K_M.gguf, m-Q8_0.gguf"),
    ],
)
def test_what_cannot_be_read_is_refused_before_any_weight_is_fetched(
    damage: object,
    error: type[MoeToolError],
    says: str,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    damage(repository)  # type: ignore[operator]
    fetched, _, found = fetch(repository, monkeypatch)
    assert isinstance(found, error)
    assert says in found.message and found.hint
    assert weights(fetched) == []


def test_a_tokenizer_from_elsewhere_makes_up_for_a_missing_one(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "tokenizer"
    other.mkdir()
    for path in repository.glob("tokenizer*"):
        path.rename(other / path.name)
    _, _, folder = fetch(repository, monkeypatch, tokenizer=other)
    assert isinstance(folder, Path)
    found = locate_model(MODEL, tokenizer=other, offline=True)
    assert found.tokenizer_folder == other
    with pytest.raises(NotFoundError, match="is here without tokenizer.json"):
        locate_model(MODEL, offline=True)


def test_an_incomplete_snapshot_is_completed(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, folder = fetch(repository, monkeypatch)
    assert isinstance(folder, Path)
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(NotFoundError, match=f"is here without {shard.name}"):
        locate_model(MODEL, offline=True)
    _, _, again = fetch(repository, monkeypatch)
    assert again == folder
    assert shard.is_file()


def test_headers_that_contradict_config_name_the_tensor(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sorted(repository.glob("model-*.safetensors"))[0]
    tensors = load_file(path)
    name = next(name for name in tensors if tensors[name].ndim == 2)
    save_file({**tensors, name: torch.zeros(3, 3)}, path)
    fetched, _, found = fetch(repository, monkeypatch)
    assert isinstance(found, CorruptArtifactError)
    assert name in found.message
    assert weights(fetched) == []


@pytest.mark.parametrize(
    "what",
    ["listing", "header", *(pytest.param(w, marks=pytest.mark.slow) for w in ("file", "weights"))],
)
def test_a_connection_that_drops_is_told_and_keeps_what_came(
    what: str, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = sorted(path.name for path in repository.glob("model-*.safetensors"))[-1]
    cut = {"header": f"{shard} bytes=0-7", "weights": shard, "file": "config.json"}.get(what, what)
    _, _, found = fetch(repository, monkeypatch, hub={"cut": cut})
    assert isinstance(found, NotFoundError)
    assert found.message.startswith(f"{MODEL} could not be downloaded: ")
    assert "is kept" in (found.hint or "")
    _, _, folder = fetch(repository, monkeypatch)
    assert isinstance(folder, Path)


@pytest.mark.parametrize("size", [0, None, -5])
def test_sizes_that_the_hub_gets_wrong_are_the_hubs_fault(
    size: int | None, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def edit(listing: dict[str, Any]) -> None:
        for file in listing["siblings"]:
            if file["rfilename"].endswith(".safetensors"):
                file["size"] = size

    fetched, _, found = fetch(repository, monkeypatch, hub={"edit": edit})
    assert isinstance(found, NotFoundError)
    assert "the hub says that model-" in found.message
    assert "HF_ENDPOINT" in (found.hint or "")
    assert weights(fetched) == []


def test_a_branch_that_moves_is_told(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = iter(["d" * 40])

    def edit(listing: dict[str, Any]) -> None:
        listing["sha"] = next(commits, COMMIT)

    _, _, found = fetch(repository, monkeypatch, hub={"edit": edit})
    assert isinstance(found, NotFoundError)
    assert "main moved" in found.message and "again" in (found.hint or "")
