"""What is read from config.json and headers, and what is refused by name."""

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, JetMoeConfig, LlamaConfig

from moe_tool.artifacts.moe_shape import ExpertTensor, MoeShape
from moe_tool.errors import (
    CorruptArtifactError,
    MoeToolError,
    NotFoundError,
    UnsupportedModelError,
)
from moe_tool.formats.safetensors_index import Checkpoint
from moe_tool.models.architecture import identity_tensor_names, open_model, read_shape
from moe_tool.models.locate import LocatedModel
from moe_tool.models.meta_model import build_meta_model
from moe_tool.models.model_config import read_config
from tests.tiny_models import TINY


def shape_of(folder: Path) -> MoeShape:
    with Checkpoint.open_folder(folder) as checkpoint:
        return read_shape(build_meta_model(folder), checkpoint)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def write_config(folder: Path, config: object) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_shape_of_mixtral(tiny_checkpoint: Callable[..., Path]) -> None:
    assert shape_of(tiny_checkpoint("mixtral", "bfloat16")) == MoeShape(
        model_type="mixtral",
        n_decoder_layers=3,
        layers=(0, 1, 2),
        experts=8,
        top_k=2,
        hidden=64,
        vocabulary=260,
        dtype="bfloat16",
        expert_tensors=(
            ExpertTensor(name="gate_up_proj", shape=(96, 64)),
            ExpertTensor(name="down_proj", shape=(64, 48)),
        ),
    )


def test_transposed_matrices_are_out_by_in_and_biases_follow(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    tensors = {t.name: t.shape for t in shape_of(tiny_checkpoint("gpt_oss")).expert_tensors}
    assert tensors == {
        "gate_up_proj": (96, 64),
        "gate_up_proj_bias": (96,),
        "down_proj": (64, 48),
        "down_proj_bias": (64,),
    }


@pytest.mark.parametrize(
    ("arch", "layers", "experts", "top_k"),
    [
        ("qwen2_moe", (0, 1, 2), 6, 2),
        ("qwen3_moe", (0, 2), 10, 3),
        ("deepseek_v2", (1, 2), 8, 2),
        ("deepseek_v3", (1, 2), 8, 2),
        ("glm4_moe", (1, 2), 8, 2),
        ("ernie4_5_moe", (1, 2), 8, 2),
        ("hunyuan_v1_moe", (0, 1, 2), 8, 2),
    ],
)
def test_layers_and_counts_are_those_of_the_config(
    arch: str,
    layers: tuple[int, ...],
    experts: int,
    top_k: int,
    tiny_checkpoint: Callable[..., Path],
) -> None:
    shape = shape_of(tiny_checkpoint(arch))
    assert (shape.layers, shape.experts, shape.top_k) == (layers, experts, top_k)
    assert shape.n_decoder_layers == 3


def test_identity_rests_on_routers_and_vectors(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("minimax_m2")
    with Checkpoint.open_folder(folder) as checkpoint:
        names = identity_tensor_names(build_meta_model(folder), checkpoint)
    of_layer = [name.removeprefix("model.layers.1.") for name in names if ".layers.1." in name]
    assert of_layer == [
        "block_sparse_moe.e_score_correction_bias",
        "block_sparse_moe.gate.weight",
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "self_attn.k_norm.weight",
        "self_attn.q_norm.weight",
    ]
    assert "model.norm.weight" in names
    assert not [name for name in names if "experts" in name]


@pytest.mark.parametrize("arch", TINY)
def test_an_opened_model_has_experts_and_skeleton_apart(
    arch: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    opened = open_model(LocatedModel(folder=tiny_checkpoint(arch), name=arch))
    with opened.checkpoint as checkpoint:
        of_experts = {
            n for layer in opened.shape.layers for n in opened.experts.tensor_names(layer)
        }
        assert not of_experts & set(opened.skeleton.tensor_names)
        assert of_experts | set(opened.skeleton.tensor_names) == set(checkpoint.tensors)
        assert opened.identity.name == opened.identity.model_type == arch


def test_tensors_that_the_model_has_no_use_for_are_left_alone(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    weights = load_file(tiny_checkpoint("glm4_moe") / "model.safetensors")
    extra = "model.layers.3.mlp.experts.0.down_proj.weight"
    weights[extra] = torch.zeros(64, 40)
    shutil.copy(tiny_checkpoint("glm4_moe") / "config.json", tmp_path)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    opened = open_model(LocatedModel(folder=tmp_path, name="glm"))
    with opened.checkpoint:
        assert extra not in opened.skeleton.tensor_names


@pytest.mark.parametrize("config", [LlamaConfig, JetMoeConfig])
def test_models_without_the_experts_interface_are_refused_by_name(
    config: type, tmp_path: Path
) -> None:
    config(num_hidden_layers=2, hidden_size=32, intermediate_size=64).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError) as caught:
        build_meta_model(tmp_path)
    assert caught.value.message.startswith(f"'{config.model_type}' is not supported")
    assert caught.value.hint is not None
    assert "README.md lists the model types" in caught.value.hint


@pytest.mark.parametrize("model_type", ["bert", "switch_transformers", "vit", "no_such_model"])
def test_model_types_that_cannot_generate_text_are_refused_by_name(
    model_type: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=f"'{model_type}' is not supported"):
        build_meta_model(write_config(tmp_path, {"model_type": model_type}))


def test_code_named_by_a_config_is_never_executed(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    trap = "from pathlib import Path\nPath(__file__).with_name('executed').touch()\n"
    (tmp_path / "modeling_trap.py").write_text(trap + "class M: pass\nclass C: pass\n")
    auto_map = {"AutoConfig": "modeling_trap.C", "AutoModelForCausalLM": "modeling_trap.M"}
    known = {**config_of(tiny_checkpoint("deepseek_v3")), "auto_map": auto_map}
    assert build_meta_model(write_config(tmp_path, known)).config.model_type == "deepseek_v3"
    write_config(tmp_path, {"model_type": "trap", "auto_map": auto_map})
    with pytest.raises(UnsupportedModelError, match="code of its own, which is never executed"):
        build_meta_model(tmp_path)
    assert not list(tmp_path.rglob("executed"))


@pytest.mark.parametrize("method", ["hqq", "aqlm"])
def test_quantized_checkpoints_are_refused_by_name(
    method: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    config = config_of(tiny_checkpoint("gpt_oss"))
    config["quantization_config"] = {"quant_method": method}
    with pytest.raises(UnsupportedModelError, match=f"stored in {method} format"):
        build_meta_model(write_config(tmp_path, config))


def test_experts_of_other_number_formats_are_refused(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    weights = load_file(tiny_checkpoint("mixtral") / "model.safetensors")
    for name in weights:
        if ".experts." in name:
            weights[name] = weights[name].to(torch.int64)
    shutil.copy(tiny_checkpoint("mixtral") / "config.json", tmp_path)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"experts\S+ is stored as I64, and no"):
        shape_of(tmp_path)


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="has no config.json"):
        build_meta_model(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b"\xff\xfe\x00",
        b"[" * 200_000,
        b"{}",
        b'{"model_type": 3}',
        b'{"model_type": ""}',
        b'{"model_type": "mixtral"}' + b" " * (4 * 2**20),
        b'{"model_type": "mixtral", "num_hidden_layers": 1000000000}',
        b'{"model_type": "mixtral", "num_hidden_layers": "two"}',
        b'{"model_type": "mixtral", "num_hidden_layers": 1, "hidden_size": "wide"}',
        b'{"model_type": "mixtral", "num_hidden_layers": 1, "hidden_size": -64}',
        b'{"model_type": "mixtral", "num_hidden_layers": 1, "num_local_experts": 1e400}',
        b'{"model_type": "mixtral", "num_hidden_layers": 1, "hidden_act": "no_such_act"}',
        b'{"model_type": "mixtral", "num_hidden_layers": 1, "num_attention_heads": 0}',
        b'{"model_type": "mixtral", "num_hidden_layers": 1, "rope_parameters": [1, 2]}',
        b'{"model_type": "mixtral", "num_hidden_layers": 1, "vocab_size": 123456789012345678901}',
    ],
)
def test_a_damaged_config_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CorruptArtifactError, match="config.json"):
        build_meta_model(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_local_experts", 4),
        ("num_local_experts", 16),
        ("num_hidden_layers", 4),
        ("hidden_size", 128),
        ("intermediate_size", 64),
        ("vocab_size", 300),
    ],
)
def test_a_config_of_another_checkpoint_is_refused(
    field: str, value: int, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_checkpoint("mixtral")
    shutil.copy(folder / "model.safetensors", tmp_path)
    write_config(tmp_path, {**config_of(folder), field: value})
    with pytest.raises(MoeToolError) as caught:
        open_model(LocatedModel(folder=tmp_path, name="other"))
    assert isinstance(caught.value, CorruptArtifactError)
    assert "wanted" in caught.value.message
    assert "found" in caught.value.message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_experts_per_tok", 0),
        ("num_experts_per_tok", 99),
        ("sliding_window", 0),
        ("sliding_window", -1),
        ("max_position_embeddings", -3),
        ("max_position_embeddings", 0),
        ("vocab_size", 10**12),
    ],
)
def test_a_number_that_no_model_has_is_refused(
    key: str, value: float, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(tiny_checkpoint("mixtral"), tmp_path / "m")
    write_config(tmp_path / "m", config_of(tmp_path / "m") | {key: value})
    with pytest.raises(CorruptArtifactError, match=r"config\.json"):
        open_model(LocatedModel(folder=tmp_path / "m", name="m"))


def test_labels_of_a_config_are_never_made(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    config = config_of(tiny_checkpoint("mixtral")) | {"num_labels": 10**8}
    write_config(tmp_path, config)
    tracemalloc.start()
    assert len(read_config(tmp_path).id2label) <= 2
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 32 * 2**20


def test_the_meta_model_takes_no_memory(tmp_path: Path) -> None:
    write_config(tmp_path, {"model_type": "mixtral"})  # 47 billion parameters by default
    model = build_meta_model(tmp_path)
    assert sum(parameter.numel() for parameter in model.parameters()) > 4e10
    assert all(parameter.is_meta for parameter in model.parameters())
    assert isinstance(model, AutoModelForCausalLM._model_mapping[type(model.config)])


def with_config(arch: str, folder: Path, **changes: object) -> LocatedModel:
    config = TINY[arch]()
    for key, value in changes.items():
        setattr(config, key, value)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return LocatedModel(folder=folder, name=arch)


@pytest.mark.parametrize(
    ("arch", "changes", "says"),
    [
        ("deepseek_v3", {"n_routed_experts": 7}, "7 experts cannot be routed in 4 groups"),
        ("deepseek_v3", {"n_group": 8}, "8 experts cannot be routed in 8 groups"),
        ("deepseek_v3", {"topk_group": 5}, r"of which 5 are chosen \(topk_group\)"),
        ("deepseek_v2", {"n_routed_experts": 7}, "7 experts cannot be routed in 4 groups"),
        ("glm4_moe", {"n_routed_experts": 7, "n_group": 4}, "7 experts cannot be routed"),
    ],
)
def test_groups_that_do_not_divide_the_experts_are_refused(
    arch: str, changes: dict[str, object], says: str, tmp_path: Path
) -> None:
    with pytest.raises(CorruptArtifactError, match=says):
        open_model(with_config(arch, tmp_path, **changes))


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        # as the hint has it
        ("deepseek_v3", {"n_routed_experts": 7, "n_group": 1, "topk_group": 1}),
        # a router that passes over the groups
        ("deepseek_v2", {"n_routed_experts": 7, "topk_method": "greedy"}),
    ],
)
def test_groups_that_the_router_can_make_are_taken(
    arch: str, changes: dict[str, object], tmp_path: Path
) -> None:
    opened = open_model(with_config(arch, tmp_path, **changes))
    with opened.checkpoint:
        assert opened.shape.experts == 7


def test_layers_of_different_numbers_of_experts_are_named(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_checkpoint("qwen2_moe")
    weights = load_file(folder / "model.safetensors")
    kept = {n: w for n, w in weights.items() if ".layers.1.mlp.experts.5." not in n}
    shutil.copy(folder / "config.json", tmp_path)
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match="layer 0 has 6 experts and layer 1 has 5"):
        open_model(LocatedModel(folder=tmp_path, name="pruned"))
