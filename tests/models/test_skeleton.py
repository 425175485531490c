"""A model whose experts are ours answers as transformers' own does."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from moe_tool.errors import CorruptArtifactError, WrongModelError
from moe_tool.formats.safetensors_index import Checkpoint
from moe_tool.models.expert_source import ExpertSource
from moe_tool.models.meta_model import build_meta_model
from moe_tool.models.skeleton import (
    LayerCall,
    Skeleton,
)
from moe_tool.models.skeleton_loader import SkeletonLoader
from moe_tool.models.tensor_map import TensorMap
from tests.models.eager_experts import eager_experts, read_once
from tests.tiny_models import TINY, VOCABULARY

# A transposed matrix is summed in another order: 1.7e-6 measured, where logits spread by 1.5.
TOLERANCE = {"gpt_oss": 5e-6}


def tokens(batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, VOCABULARY - 4, (batch, length), generator=generator)


def reference(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()


def ours(folder: Path) -> Skeleton:
    with Checkpoint.open_folder(folder) as checkpoint:
        skeleton = SkeletonLoader(folder, checkpoint).load()
        source = ExpertSource(build_meta_model(folder), checkpoint)
        kept = {
            (layer, expert): source.read(layer, expert)
            for layer in skeleton.shape.layers
            for expert in range(skeleton.shape.experts)
        }
    skeleton.set_experts_function(eager_experts(read_once(lambda *key: kept[key])))
    return skeleton


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arch", TINY)
def test_logits_equal_those_of_the_eager_model(
    arch: str, dtype: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    folder = tiny_checkpoint(arch, dtype)
    ids = tokens(2, 40)
    wanted = reference(folder)(ids).logits
    found = ours(folder).model(ids).logits
    assert (found - wanted).abs().max() <= TOLERANCE.get(arch, 0.0)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("arch", TINY)
def test_greedy_generation_is_token_identical(
    arch: str, batch: int, tiny_checkpoint: Callable[..., Path]
) -> None:
    folder = tiny_checkpoint(arch)
    ids = tokens(batch, 11)
    options = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": None}
    wanted = reference(folder).generate(ids, **options)
    found = ours(folder).model.generate(ids, **options)
    assert found.shape == (batch, 43)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("arch", TINY)
def test_nothing_is_left_on_meta_and_no_expert_is_loaded(
    arch: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    folder = tiny_checkpoint(arch)
    with Checkpoint.open_folder(folder) as checkpoint:
        skeleton = SkeletonLoader(folder, checkpoint).load()
        names = TensorMap(build_meta_model(folder), checkpoint).skeleton_names()
        assert checkpoint.bytes_read == sum(checkpoint.tensors[n].size_bytes for n in names)
    everything = [*skeleton.model.named_parameters(), *skeleton.model.named_buffers()]
    assert not [name for name, tensor in everything if tensor.is_meta]
    for modules in skeleton.layers:
        assert not list(modules.experts.named_parameters(recurse=False))


def test_tied_embeddings_are_one_tensor(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("granitemoe")
    with Checkpoint.open_folder(folder) as checkpoint:
        model = SkeletonLoader(folder, checkpoint).load().model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_skeleton_loads_from_files_that_hold_no_experts(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_checkpoint("gpt_oss")
    with Checkpoint.open_folder(folder) as checkpoint:
        whole = SkeletonLoader(folder, checkpoint).load()
        names = TensorMap(build_meta_model(folder), checkpoint).skeleton_names()
    weights = load_file(folder / "model.safetensors")
    save_file({name: weights[name] for name in names}, tmp_path / "skeleton-00001.safetensors")
    with Checkpoint.open_files([tmp_path / "skeleton-00001.safetensors"]) as checkpoint:
        alone = SkeletonLoader(folder, checkpoint, shape=whole.shape).load()
    assert alone.shape == whole.shape
    wanted = dict(whole.model.named_parameters())
    assert wanted.keys() == dict(alone.model.named_parameters()).keys()
    for name, parameter in alone.model.named_parameters():
        assert torch.equal(parameter, wanted[name])


def test_a_skeleton_of_another_shape_is_refused(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("mixtral")
    with Checkpoint.open_folder(folder) as checkpoint:
        shape = SkeletonLoader(folder, checkpoint).load().shape
        other = shape.model_copy(update={"experts": 16})
        with pytest.raises(WrongModelError, match="experts 8, the experts were made for 16"):
            SkeletonLoader(folder, checkpoint, shape=other).load()


def test_an_experts_call_carries_layer_and_router_logits(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    folder = tiny_checkpoint("qwen3_moe")
    calls: list[LayerCall] = []
    with Checkpoint.open_folder(folder) as checkpoint:
        skeleton = SkeletonLoader(folder, checkpoint).load()

    def record(call: LayerCall) -> torch.Tensor:
        calls.append(call)
        return torch.zeros_like(call.hidden)

    skeleton.set_experts_function(record)
    with torch.no_grad():
        skeleton.model(tokens(2, 5))
    assert [call.layer for call in calls] == [0, 2]  # layer 1 is dense
    for call in calls:
        assert call.hidden.shape == (10, 64)
        assert call.index.shape == call.weight.shape == (10, 3)
        assert call.router_logits is not None
        assert torch.equal(call.router_logits.topk(3)[1], call.index)


def test_generation_config_is_loaded(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint("mixtral"), folder)
    (folder / "generation_config.json").write_text(json.dumps({"top_k": 17}))
    with Checkpoint.open_folder(folder) as checkpoint:
        assert SkeletonLoader(folder, checkpoint).load().model.generation_config.top_k == 17


def test_a_damaged_generation_config_is_named(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint("mixtral"), folder)
    (folder / "generation_config.json").write_text("{")
    with (
        Checkpoint.open_folder(folder) as checkpoint,
        pytest.raises(CorruptArtifactError, match="generation_config.json is damaged"),
    ):
        SkeletonLoader(folder, checkpoint).load()


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("mixtral", "model.layers.1.self_attn.q_proj.weight"),
        ("mixtral", "lm_head.weight"),
        ("granitemoe", "model.embed_tokens.weight"),
        ("deepseek_v3", "model.layers.2.mlp.gate.e_score_correction_bias"),
    ],
)
def test_a_missing_tensor_is_named_before_any_is_read(
    arch: str, name: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    weights = load_file(tiny_checkpoint(arch) / "model.safetensors")
    del weights[name]
    folder = _write(tiny_checkpoint(arch), tmp_path, weights)
    with Checkpoint.open_folder(folder) as checkpoint:
        with pytest.raises(CorruptArtifactError) as caught:
            SkeletonLoader(folder, checkpoint).load()
        assert checkpoint.bytes_read == 0
    assert name in caught.value.message
    assert "found none" in caught.value.message


def test_a_tensor_of_another_shape_is_named_with_both_shapes(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    weights = load_file(tiny_checkpoint("mixtral") / "model.safetensors")
    weights[name] = torch.zeros(33, 64)
    folder = _write(tiny_checkpoint("mixtral"), tmp_path, weights)
    with Checkpoint.open_folder(folder) as checkpoint:
        with pytest.raises(CorruptArtifactError) as caught:
            SkeletonLoader(folder, checkpoint).load()
        assert checkpoint.bytes_read == 0
    assert caught.value.message == f"{name} does not fit the model: wanted [32, 64], found [33, 64]"


def _write(model: Path, folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    shutil.copy(model / "config.json", folder)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder
