"""An expert read alone equals the row of the model's own stacked parameter."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moe_tool.errors import CorruptArtifactError
from moe_tool.formats.safetensors_index import Checkpoint
from moe_tool.models.architecture import open_model
from moe_tool.models.expert_source import ExpertSource
from moe_tool.models.locate import LocatedModel
from moe_tool.models.meta_model import build_meta_model
from moe_tool.models.moe_layers import find_moe_layers
from tests.tiny_models import TINY, make_tiny_checkpoint

TRANSPOSED = {"gpt_oss"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arch", TINY)
def test_every_expert_equals_the_models_own(
    arch: str, dtype: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    folder = tiny_checkpoint(arch, dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    with Checkpoint.open_folder(folder) as checkpoint:
        source = ExpertSource(build_meta_model(folder), checkpoint)
        for modules in find_moe_layers(model):
            wanted = dict(modules.experts.named_parameters(recurse=False))
            for expert in range(modules.experts.num_experts):
                found = source.read(modules.layer, expert)
                assert list(found) == list(wanted)
                for name, tensor in found.items():
                    own = wanted[name][expert]
                    is_turned = arch in TRANSPOSED and own.ndim == 2
                    assert torch.equal(tensor, own.T if is_turned else own)
                    assert tensor.is_contiguous()
                    assert tensor.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("arch", TINY)
def test_reading_all_experts_reads_each_byte_once(
    arch: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    folder = tiny_checkpoint(arch)
    with Checkpoint.open_folder(folder) as checkpoint:
        model = build_meta_model(folder)
        source = ExpertSource(model, checkpoint)
        wanted = 0
        for modules in find_moe_layers(model):
            names = source.tensor_names(modules.layer)
            wanted += sum(checkpoint.tensors[name].size_bytes for name in names)
            for expert in range(modules.experts.num_experts):
                source.read(modules.layer, expert)
        assert checkpoint.bytes_read == wanted > 0


def test_a_sharded_checkpoint_reads_alike(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    sharded = make_tiny_checkpoint("mixtral", tmp_path, max_shard_size="200KB")
    assert (sharded / "model.safetensors.index.json").is_file()
    with (
        Checkpoint.open_folder(sharded) as first,
        Checkpoint.open_folder(tiny_checkpoint("mixtral")) as second,
    ):
        found = ExpertSource(build_meta_model(sharded), first).read(2, 7)
        wanted = ExpertSource(build_meta_model(sharded), second).read(2, 7)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)


@pytest.mark.parametrize(
    ("arch", "name", "shape", "message"),
    [
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w1.weight", None, "tensors, wanted"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w2.weight", None, "lacks expert 3"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w1.weight", (48, 63), "[48, 63]"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.0.w1.weight", (48, 63), "[48, 63]"),
        (
            "mixtral",
            "model.layers.1.block_sparse_moe.experts.8.w2.weight",
            (64, 48),
            "one expert too",
        ),
        (
            "granitemoe",
            "model.layers.1.block_sparse_moe.input_linear.weight",
            None,
            "lacks a tensor",
        ),
        (
            "granitemoe",
            "model.layers.1.block_sparse_moe.input_linear.weight",
            (7, 96, 64),
            "[7, 96",
        ),
        ("gpt_oss", "model.layers.1.mlp.experts.down_proj", (8, 64, 64), "[8, 64, 64]"),
        ("gpt_oss", "model.layers.1.mlp.experts.down_proj_bias", None, "lacks a tensor"),
    ],
)
def test_experts_that_do_not_fit_the_config_are_named_before_any_is_read(
    arch: str,
    name: str,
    shape: tuple[int, ...] | None,
    message: str,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    weights = load_file(tiny_checkpoint(arch) / "model.safetensors")
    weights.pop(name, None)
    if shape is not None:
        weights[name] = torch.zeros(shape)
    shutil.copy(tiny_checkpoint(arch) / "config.json", tmp_path)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with Checkpoint.open_folder(tmp_path) as checkpoint:
        with pytest.raises(CorruptArtifactError) as caught:
            ExpertSource(build_meta_model(tmp_path), checkpoint)
        assert checkpoint.bytes_read == 0
    assert message in caught.value.message


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "model.layers.1.block_sparse_moe.experts.3.w2.weight"]
)
def test_a_tensor_that_only_the_index_lacks_leads_to_the_index(
    name: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint("mixtral")
    shutil.copy(source / "config.json", tmp_path)
    shutil.copy(source / "model.safetensors", tmp_path / "model-1.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    weight_map = dict.fromkeys(load_file(source / "model.safetensors"), "model-1.safetensors")
    del weight_map[name]
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CorruptArtifactError) as caught:
        open_model(LocatedModel(folder=tmp_path, name="tiny"))
    assert caught.value.hint is not None
    assert f"model-1.safetensors holds '{name}'" in caught.value.hint
    weight_map[name] = "model-1.safetensors"
    index.write_text(json.dumps({"weight_map": weight_map}))  # as the hint says
    open_model(LocatedModel(folder=tmp_path, name="tiny"))
