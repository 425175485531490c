"""Codes are never cast to weights, and tensors that nothing uses are refused or named."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_tool.errors import UnsupportedModelError
from moe_tool.models.architecture import OpenedModel, open_model
from moe_tool.models.locate import LocatedModel
from moe_tool.packing import pack_bundle as packing
from moe_tool.packing.pack_options import parse_pack_options
from tests.packed import pack_bundle
from tests.tiny_models import TINY

TinyCheckpoint = Callable[..., Path]
ATTENTION = "model.layers.1.self_attn"
QUERY = f"{ATTENTION}.q_proj"


def with_tensors(
    source: Path, folder: Path, tensors: dict[str, torch.Tensor], arch: str = "mixtral"
) -> LocatedModel:
    shutil.copytree(source, folder)
    weights = load_file(source / "model.safetensors")
    save_file(weights | tensors, folder / "model.safetensors", {"format": "pt"})
    return LocatedModel(folder=folder, name=arch)


def opened(model: LocatedModel) -> OpenedModel:
    made = open_model(model)
    made.checkpoint.close()
    return made


FP8 = torch.ones(64, 64).to(torch.float8_e4m3fn)
FAULTS = {
    "FP8 with scales": (
        {f"{QUERY}.weight": FP8, f"{QUERY}.weight_scale_inv": torch.ones(1, 1)},
        "q_proj.weight_scale_inv', a part of weights stored as codes",
    ),
    "FP8 alone": ({f"{QUERY}.weight": FP8}, "q_proj.weight' is stored as F8_E4M3, codes of FP8"),
    "bytes alone": (
        {f"{QUERY}.weight": torch.ones(64, 64, dtype=torch.int8)},
        "is stored as I8, codes of int8, as in bitsandbytes",
    ),
    "bitsandbytes": (
        {
            f"{QUERY}.weight": torch.ones(64, 64, dtype=torch.int8),
            f"{QUERY}.SCB": torch.ones(64),
        },
        "q_proj.SCB', a part of weights stored as codes",
    ),
    "coded experts": (
        {"model.layers.0.block_sparse_moe.experts.3.w1.weight": torch.ones(48, 64).to(FP8.dtype)},
        "is stored as F8_E4M3",
    ),
    "an adapter inside": (
        {f"{QUERY}.lora_A.weight": torch.ones(4, 64)},
        "q_proj.lora_A.weight', a part of an adapter",
    ),
    "scales of 4-bit codes": (
        {f"{QUERY}.weight.absmax": torch.ones(4)},
        "q_proj.weight.absmax', a part of weights stored as codes",
    ),
    "scales of the head": ({"lm_head.weight_scale": torch.ones(1)}, "lm_head.weight_scale"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_codes_and_parts_of_others_are_refused(
    name: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    tensors, words = FAULTS[name]
    source = tiny_checkpoint("mixtral")
    names = load_file(source / "model.safetensors").keys()
    if name == "coded experts":
        assert not tensors.keys() - names
    with pytest.raises(UnsupportedModelError) as caught:
        opened(with_tensors(source, tmp_path / "m", tensors))
    assert words in caught.value.message and caught.value.hint


def test_tensors_without_a_place_are_named_once(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    names = [f"model.layers.{layer}.self_attn.{m}_proj.bias" for layer in (0, 1) for m in "qo"]
    tensors = {name: torch.ones(64) for name in names}
    model = with_tensors(tiny_checkpoint("mixtral"), tmp_path / "m", tensors)
    (model.folder / "adapter_config.json").write_text("{}")
    warnings = opened(model).warnings
    assert len(warnings) == 2
    assert f"'{names[1]}'" in warnings[0] and "and 1 more tensors" in warnings[0]
    assert "adapter_config.json belongs to an adapter, which is not applied" in warnings[1]


def test_packing_says_what_has_no_effect(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    model = with_tensors(
        tiny_checkpoint("mixtral"), tmp_path / "m", {f"{QUERY}.bias": torch.ones(64)}
    )

    class Notes:
        def __init__(self) -> None:
            self.texts: list[str] = []

        def begin(self, task: str, total: int | None, unit: str) -> None: ...

        def advance(self, amount: int = 1) -> None: ...

        def end(self) -> None: ...

        def note(self, text: str) -> None:
            self.texts.append(text)

    notes = Notes()
    options = parse_pack_options(out=tmp_path / "b", bits="native")
    packing.pack_bundle(model, options, progress=notes)
    assert [text for text in notes.texts if f"'{QUERY}.bias'" in text]


def test_parts_that_a_language_model_lacks_are_no_faults(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    harmless = [
        f"{ATTENTION}.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "mtp.layers.0.self_attn.q_proj.weight",
        "mtp.layers.0.self_attn.q_proj.weight_scale_inv",
        "model.layers.3.self_attn.q_proj.weight_scale_inv",
        "model.layers.3.eh_proj.weight",
        "model.visual.blocks.0.attn.qkv.weight_scale",
        "vision_tower.scale",
        f"{ATTENTION}.k_scale",
    ]
    model = with_tensors(
        tiny_checkpoint("mixtral"), tmp_path / "m", {name: torch.ones(2) for name in harmless}
    )
    assert opened(model).warnings == ()


def test_parts_that_were_left_out_of_the_model_are_no_faults(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model.ears.0.layer_scale"
    model = with_tensors(tiny_checkpoint("mixtral"), tmp_path / "m", {name: torch.ones(2)})
    with pytest.raises(UnsupportedModelError, match="layer_scale"):
        opened(model)
    monkeypatch.setattr("moe_tool.models.tensor_map.left_out", lambda _: (name,))
    assert opened(model).warnings == ()


def test_every_tiny_model_uses_all_of_its_tensors(tiny_checkpoint: TinyCheckpoint) -> None:
    for arch in TINY:
        assert opened(LocatedModel(folder=tiny_checkpoint(arch), name=arch)).warnings == ()


def test_experts_of_several_floats_are_read_as_float32(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    source = tiny_checkpoint("mixtral", "bfloat16")
    weights = load_file(source / "model.safetensors")
    name = next(name for name in weights if "experts" in name)
    model = with_tensors(source, tmp_path / "m", {name: weights[name].to(torch.float16)})
    mixed, plain = open_model(model), open_model(LocatedModel(folder=source, name="m"))
    with mixed.checkpoint, plain.checkpoint:
        assert mixed.shape == plain.shape.model_copy(update={"dtype": "float32"})
        for expert in range(mixed.shape.experts):
            found, wanted = mixed.experts.read(0, expert), plain.experts.read(0, expert)
            for key, tensor in found.items():
                assert tensor.dtype == torch.float32
                assert torch.allclose(tensor, wanted[key].float(), atol=2**-24, rtol=0)
    assert pack_bundle(model, out=tmp_path / "b", bits="native").bytes > 0
