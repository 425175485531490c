"""The full hash depends on every byte of every tensor, and on nothing else."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from moe_tool.formats.safetensors_index import Checkpoint
from moe_tool.models.full_hash import FullHash


def hash_of(folder: Path, names: list[str] | None = None) -> str:
    with Checkpoint.open_folder(folder) as checkpoint:
        full_hash = FullHash()
        checkpoint.on_read = full_hash.add
        for name in names or list(checkpoint.tensors):
            checkpoint.read(name)
        return full_hash.result()


def test_order_of_reading_does_not_matter(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("mixtral")
    with Checkpoint.open_folder(folder) as checkpoint:
        backwards = list(checkpoint.tensors)[::-1]
    assert hash_of(folder, backwards) == hash_of(folder)


def test_one_changed_weight_changes_it(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_checkpoint("mixtral")
    tensors = load_file(folder / "model.safetensors")
    name = sorted(tensors)[5]
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[-1] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    assert hash_of(tmp_path) != hash_of(folder)


def test_going_on_with_kept_digests_gives_the_same(tiny_checkpoint: Callable[..., Path]) -> None:
    with Checkpoint.open_folder(tiny_checkpoint("granitemoe")) as checkpoint:
        names = list(checkpoint.tensors)
        whole, first = FullHash(), FullHash()
        for part in (whole, first):
            checkpoint.on_read = part.add
            for name in names if part is whole else names[:4]:
                checkpoint.read(name)
        second = FullHash(first.digests)
        checkpoint.on_read = second.add
        for name in names[4:]:
            checkpoint.read(name)
    assert second.result() == whole.result()


def test_rows_are_told_apart(tmp_path: Path) -> None:
    save_file({"x": torch.arange(6.0).view(2, 3)}, tmp_path / "model.safetensors")
    with Checkpoint.open_folder(tmp_path) as checkpoint:
        one, two = FullHash(), FullHash()
        checkpoint.on_read = one.add
        checkpoint.read("x", row=0)
        checkpoint.on_read = two.add
        checkpoint.read("x", row=1)
    assert one.result() != two.result()
