"""Composite checkpoints as they lie on the hub, which is not as `save_pretrained` writes them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, PreTrainedModel

from moe_tool.models.architecture import open_model
from moe_tool.models.locate import LocatedModel
from moe_tool.models.meta_model import build_meta_model
from moe_tool.models.text_part import left_out
from moe_tool.packing.pack_bundle import PackReport
from tests.packed import pack_bundle
from tests.zoo.test_zoo import make_checkpoint
from tests.zoo.zoo_table import ZOO

Tensors = dict[str, torch.Tensor]


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> Tensors:
    """Change the weight file; return its new content."""
    path = folder / "model.safetensors"
    made = {name: value.contiguous() for name, value in change(load_file(path)).items()}
    save_file(made, path, metadata={"format": "pt"})
    return made


def pack(folder: Path) -> PackReport:
    out = folder.parent / "bundle"
    return pack_bundle(LocatedModel(folder=folder, name="zoo"), out=out, bits="native")


def experts_of(folder: Path) -> Tensors:
    opened = open_model(LocatedModel(folder=folder, name="zoo"))
    with opened.checkpoint:
        layers = opened.shape.layers
        return {
            f"{layer} {expert} {name}": value
            for layer in layers
            for expert in range(opened.shape.experts)
            for name, value in opened.experts.read(layer, expert).items()
        }


def experts_in(model: PreTrainedModel) -> Tensors:
    found = {}
    for layer, block in enumerate(model.model.language_model.layers):
        for name, stacked in block.mlp.experts.named_parameters():
            for expert, value in enumerate(stacked.detach()):
                found[f"{layer} {expert} {name}"] = value
    return found


def transpose_experts(tensors: Tensors) -> Tensors:
    """Store stacked experts as [E, in, out], as Qwen3-VL is published."""
    return {
        name: value.transpose(1, 2) if ".experts." in name else value
        for name, value in tensors.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("inner", [40, 32], ids=["oblong", "square"])
@pytest.mark.parametrize("is_transposed", [False, True], ids=["saved", "published"])
def test_stacked_experts_are_turned_as_the_module_wants_them(
    is_transposed: bool, inner: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = ZOO["qwen3_vl_moe"].fields
    monkeypatch.setitem(fields, "moe_intermediate_size", inner)  # 2 * 32 is the hidden size
    folder, model = make_checkpoint("qwen3_vl_moe", tmp_path / "model")
    if is_transposed:
        rewrite(folder, transpose_experts)
    found, wanted = experts_of(folder), experts_in(model)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.slow
def test_towers_and_other_heads_stay_out_of_the_bundle(tmp_path: Path) -> None:
    folder, _ = make_checkpoint("qwen3_vl_moe", tmp_path / "model")
    vision = {name for name in load_file(folder / "model.safetensors") if ".visual." in name}
    assert len(vision) > 10
    rewrite(folder, lambda tensors: tensors | {"mtp.fc.weight": torch.ones(64, 128)})
    pack(folder)
    packed = load_file(tmp_path / "bundle" / "skeleton-00001.safetensors")
    assert packed and not [name for name in packed if "visual" in name or "mtp" in name]
    names = left_out(build_meta_model(tmp_path / "bundle"))
    assert len(names) >= len(vision) and all("visual" in name for name in names)


@pytest.mark.slow
def test_a_fault_in_a_tower_is_no_fault(tmp_path: Path) -> None:
    folder, model = make_checkpoint("qwen3_vl_moe", tmp_path / "model")

    def cut(tensors: Tensors) -> Tensors:
        return {name: value for name, value in tensors.items() if ".visual." not in name}

    rewrite(folder, cut)
    assert experts_of(folder).keys() == experts_in(model).keys()


@pytest.mark.slow
def test_the_thinker_of_an_omni_model_is_found_by_its_prefix(tmp_path: Path) -> None:
    folder, _ = make_checkpoint("qwen3_omni_moe_thinker", tmp_path / "model")
    wanted = experts_of(folder)
    shutil.copytree(folder, tmp_path / "omni")
    raw = json.loads((folder / "config.json").read_text())
    whole = {"model_type": "qwen3_omni_moe", "thinker_config": raw, "talker_config": {}}
    (tmp_path / "omni" / "config.json").write_text(json.dumps(whole))

    def omni(tensors: Tensors) -> Tensors:
        talker = {"talker.model.norm.weight": torch.ones(8), "code2wav.a.scale": torch.ones(8)}
        return {f"thinker.{name}": value for name, value in tensors.items()} | talker

    rewrite(tmp_path / "omni", omni)
    found = experts_of(tmp_path / "omni")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    pack(tmp_path / "omni")


@pytest.mark.slow
def test_the_text_part_under_the_older_prefix_is_read(tmp_path: Path) -> None:
    """Kimi-K2.5 has its text model's tensors as language_model.model.layers.*."""
    folder, _ = make_checkpoint("kimi_k25", tmp_path / "model")
    wanted = experts_of(folder)

    def published(tensors: Tensors) -> Tensors:
        return {name.replace(".blocks.", ".layers."): value for name, value in tensors.items()}

    names = rewrite(folder, published)
    assert any(name.startswith("language_model.model.layers.") for name in names)
    found = experts_of(folder)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.slow
def test_the_reloaded_model_agrees(tmp_path: Path) -> None:
    """transformers turns the published layout itself, so both readings can be compared."""
    folder, model = make_checkpoint("qwen3_vl_moe", tmp_path / "model")
    rewrite(folder, transpose_experts)
    loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    wanted = experts_in(loaded)
    assert all(torch.equal(wanted[name], value) for name, value in experts_in(model).items())
    assert all(torch.equal(experts_of(folder)[name], value) for name, value in wanted.items())
