"""Checkpoints: what the safetensors library writes is what is read."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from moe_tool.errors import CorruptArtifactError
from moe_tool.formats.safetensors_index import Checkpoint, read_header

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
TENSORS = {
    "b.weight": torch.arange(12.0).view(3, 4),
    "a.bias": torch.tensor([1, -2], dtype=torch.int64),
    "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def sharded(folder: Path, shards: dict[str, dict[str, torch.Tensor]]) -> Path:
    weight_map = {}
    for shard, tensors in shards.items():
        save_file(tensors, folder / shard)
        weight_map |= dict.fromkeys(tensors, shard)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_a_header_byte_by_byte(tmp_path: Path) -> None:
    header = b'{"x":{"dtype":"U8","shape":[2,1],"data_offsets":[0,2]}}'
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\x07\x09")
    (info,) = read_header(path).values()
    assert (info.name, info.dtype, info.shape, info.size_bytes) == ("x", "U8", (2, 1), 2)
    assert info.offset == 8 + len(header)
    with Checkpoint.open_files([path]) as checkpoint:
        assert checkpoint.read("x").tolist() == [[7], [9]]


def test_tensors_are_listed_by_name_and_every_byte_read_is_counted(folder: Path) -> None:
    with Checkpoint.open_folder(folder) as checkpoint:
        assert list(checkpoint.tensors) == ["a.bias", "b.weight", "scalar"]
        assert checkpoint.total_bytes == 48 + 16 + 2 and checkpoint.bytes_read == 0
        checkpoint.read("b.weight", row=1)
        assert checkpoint.bytes_read == 16
        checkpoint.read_bytes("a.bias")
        assert checkpoint.bytes_read == 32


def test_a_row_is_read_alone(folder: Path) -> None:
    with Checkpoint.open_folder(folder) as checkpoint:
        assert checkpoint.read("b.weight", row=2).tolist() == [8, 9, 10, 11]
        assert checkpoint.read("a.bias", row=1).tolist() == -2


def test_what_is_read_is_a_copy(folder: Path) -> None:
    with Checkpoint.open_folder(folder) as checkpoint:
        checkpoint.read("b.weight").zero_()
        assert torch.equal(checkpoint.read("b.weight"), TENSORS["b.weight"])


def test_a_closed_checkpoint_opens_its_files_again(folder: Path) -> None:
    checkpoint = Checkpoint.open_folder(folder)
    checkpoint.read("scalar")
    checkpoint.close()
    assert checkpoint.read("scalar") == 2.5
    checkpoint.close()


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    one, two = {"x": torch.ones(2)}, {"y": torch.zeros(3), "z": torch.ones(1)}
    sharded(tmp_path, {"model-1.safetensors": one, "model-2.safetensors": two})
    with Checkpoint.open_folder(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["x", "y", "z"]
        assert checkpoint.read("y").tolist() == [0, 0, 0]
        assert checkpoint.total_bytes == 24


def test_a_folder_of_links_is_read_as_the_hubs_cache_is(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    save_file(TENSORS, blobs / "0123abcd")
    (snapshot / "model.safetensors").symlink_to("../blobs/0123abcd")
    with Checkpoint.open_folder(snapshot) as checkpoint:
        assert torch.equal(checkpoint.read("b.weight"), TENSORS["b.weight"])


def test_a_tensor_without_elements_is_read(tmp_path: Path) -> None:
    save_file({"none": torch.empty(0, 3), "one": torch.ones(1)}, tmp_path / "model.safetensors")
    with Checkpoint.open_folder(tmp_path) as checkpoint:
        assert checkpoint.read("none").shape == (0, 3)
        assert checkpoint.read_bytes("none") == b""


def test_a_file_that_became_shorter_since_it_was_opened_is_named(folder: Path) -> None:
    checkpoint = Checkpoint.open_folder(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with checkpoint, pytest.raises(CorruptArtifactError, match="model.safetensors"):
        for name in checkpoint.tensors:
            checkpoint.read(name)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_what_the_library_writes_comes_back(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    names = data.draw(st.lists(st.text(min_size=1, max_size=12), unique=True, max_size=5))
    tensors = {}
    for name in names:
        if name == "__metadata__":
            continue
        shape = data.draw(st.lists(st.integers(1, 5), max_size=3))
        dtype = data.draw(st.sampled_from(DTYPES))
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
        tensors[name] = torch.randint(0, 2, shape, generator=generator).to(dtype)
    path = tmp_path_factory.mktemp("library") / "model.safetensors"
    save_file(tensors, path)
    with Checkpoint.open_files([path]) as checkpoint:
        assert list(checkpoint.tensors) == sorted(tensors)
        for name, tensor in tensors.items():
            found = checkpoint.read(name)
            assert found.dtype == tensor.dtype and found.shape == tensor.shape
            assert torch.equal(found.to(torch.float64), tensor.to(torch.float64))
        assert checkpoint.bytes_read == checkpoint.total_bytes


def set_map(folder: Path, **changed: str) -> None:
    index = folder / "model.safetensors.index.json"
    parsed = json.loads(index.read_text())
    parsed["weight_map"] |= changed
    index.write_text(json.dumps(parsed))


def two_shards(folder: Path) -> Path:
    return sharded(
        folder,
        {
            "model-1.safetensors": {"a": torch.zeros(2)},
            "model-2.safetensors": {"b": torch.ones(3)},
        },
    )


def test_a_name_in_two_shards_is_read_where_the_index_puts_it(tmp_path: Path) -> None:
    two_shards(tmp_path)
    save_file({"a": torch.full((2,), 7.0), "b": torch.ones(3)}, tmp_path / "model-2.safetensors")
    for shard, value, extra in (("1", 0.0, "model-2"), ("2", 7.0, "model-1")):
        set_map(tmp_path, a=f"model-{shard}.safetensors", b="model-2.safetensors")
        if shard == "2":
            set_map(tmp_path, c="model-1.safetensors")
        with Checkpoint.open_folder(tmp_path) as checkpoint:
            assert checkpoint.read("a").tolist() == [value, value]
            assert any(f"{extra}.safetensors holds 'a'" in each for each in checkpoint.remarks)


def test_a_name_that_its_shard_lacks_is_not_there_and_said(tmp_path: Path) -> None:
    two_shards(tmp_path)
    set_map(tmp_path, c="model-1.safetensors", d="model-1.safetensors")
    with Checkpoint.open_folder(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == {"a", "b"}
        assert checkpoint.remarks == (
            "model.safetensors.index.json puts 'c' and 1 more into model-1.safetensors, "
            "which does not hold it",
        )


def test_an_index_that_says_what_the_shards_hold_is_not_remarked_on(tmp_path: Path) -> None:
    with Checkpoint.open_folder(two_shards(tmp_path)) as checkpoint:
        assert checkpoint.remarks == ()


def test_a_shard_downloaded_in_part_is_told_so(tmp_path: Path) -> None:
    two_shards(tmp_path)
    shard = tmp_path / "model-2.safetensors"
    shard.rename(f"{shard}.incomplete")
    with pytest.raises(CorruptArtifactError, match="downloaded only in part"):
        Checkpoint.open_folder(tmp_path)
