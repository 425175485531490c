"""A quantized checkpoint's matrices beside the experts are held in its codes."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from moe_tool.errors import CorruptArtifactError
from moe_tool.models.architecture import open_model
from moe_tool.models.locate import LocatedModel
from moe_tool.models.skeleton import Skeleton
from moe_tool.models.skeleton_facts import skeleton_facts
from moe_tool.models.skeleton_loader import SkeletonLoader
from moe_tool.models.stored_modules import StoredEmbedding, StoredLinear
from moe_tool.native.kernels import round_tokens
from moe_tool.quantization.kept_codes import KeptWeight
from moe_tool.quantization.weights import FloatWeight
from tests.models.stored_formats.test_coded_models import LINEAR, MODELS, write_pair

CODED = [name for name in MODELS if name != "mxfp4"]  # there only experts have codes
O_PROJ = "model.layers.1.self_attn.o_proj"


def loaded(folder: Path) -> tuple[SkeletonLoader, Skeleton]:
    opened = open_model(LocatedModel(folder=folder, name="m"))
    with opened.checkpoint as checkpoint:
        loader = SkeletonLoader(folder, checkpoint)
        return loader, loader.load()


def parts_of(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    if isinstance(module, StoredLinear | StoredEmbedding):
        stored = module.stored
        if isinstance(stored, FloatWeight):
            yield stored.values
        else:
            assert isinstance(stored, KeptWeight)
            parts = (stored.codes, stored.scale, stored.zero, stored.global_scale)
            yield from (part for part in parts if part is not None)


def held(skeleton: Skeleton) -> int:
    """Bytes of storage, each counted once; buffers that no checkpoint holds are left out."""
    model = skeleton.model
    computed = {id(b) for _, b in model.named_non_persistent_buffers()}
    tensors = [*model.parameters(), *(b for b in model.buffers() if id(b) not in computed)]
    tensors += [part for module in model.modules() for part in parts_of(module)]
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


@pytest.mark.parametrize("name", CODED)
def test_memory_is_known_before_a_byte_is_read(name: str, tmp_path: Path) -> None:
    coded, plain = write_pair(name, tmp_path)
    loader, skeleton = loaded(coded)
    assert loader.held_bytes == held(skeleton)
    for module_name, module in skeleton.model.named_modules():
        if isinstance(module, StoredLinear):
            is_coded = LINEAR.search(f"{module_name}.weight") is not None
            assert isinstance(module.stored, KeptWeight) == is_coded, module_name
    weights = load_file(plain / "model.safetensors")
    looked_at = skeleton.model.get_submodule(O_PROJ).weight
    assert torch.equal(looked_at, weights[f"{O_PROJ}.weight"])


def test_bytes_of_fp8_by_hand(tmp_path: Path) -> None:
    coded, _ = write_pair("fp8", tmp_path)
    loader, _ = loaded(coded)
    weights = load_file(coded / "model.safetensors")
    wanted = 0
    for name, tensor in weights.items():
        if ".experts." in name:
            continue
        # Codes, their scales and bfloat16 matrices as they lie; the rest is widened to float32.
        is_matrix = tensor.ndim == 2 and ".gate.weight" not in name
        is_narrow = tensor.dtype == torch.bfloat16
        wanted += tensor.nbytes * (2 if is_narrow and not is_matrix else 1)
    assert loader.held_bytes == wanted


@pytest.mark.parametrize("name", ["fp8", "int4"])
def test_facts_of_rounded_matrices_hold_no_codes_twice(name: str, tmp_path: Path) -> None:
    coded, _ = write_pair(name, tmp_path)
    opened = open_model(LocatedModel(folder=coded, name="m"))
    with opened.checkpoint:
        facts = skeleton_facts(opened, coded)
    weights = load_file(coded / "model.safetensors")
    skeleton = {n: t for n, t in weights.items() if ".experts." not in n}
    unused = sum(t.nbytes for n, t in skeleton.items() if n.endswith("weight_shape"))
    assert facts.native_bytes == sum(t.nbytes for t in skeleton.values()) - unused
    others = ("norm", "embed_tokens", ".gate.")
    left = sum(t.nbytes for n, t in skeleton.items() if any(word in n for word in others))
    assert facts.native_bytes - facts.linear_native_bytes == left


def test_codes_of_a_bundle_of_floats_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As GGUF's, whose bundles hold floats: both sides of the proof compute alike."""
    coded, _ = write_pair("fp8", tmp_path)
    opened = open_model(LocatedModel(folder=coded, name="m"))
    with opened.checkpoint as checkpoint:
        monkeypatch.setattr(checkpoint, "is_declared", False)
        loader = SkeletonLoader(coded, checkpoint)
        skeleton = loader.load()
    assert loader.kept_bytes == {} and loader.held_bytes == held(skeleton)


@pytest.mark.parametrize("n_tokens", [1, 9, 40])
def test_tokens_stay_floats_whatever_experts_do(n_tokens: int, tmp_path: Path) -> None:
    coded, _ = write_pair("int4", tmp_path)
    _, skeleton = loaded(coded)
    module = skeleton.model.get_submodule(O_PROJ)
    x = torch.randn(n_tokens, 64, generator=torch.Generator().manual_seed(1))
    plain = module(x)
    assert torch.allclose(plain, F.linear(x, module.weight), rtol=0, atol=2e-5)
    round_tokens(True)
    try:
        assert torch.equal(module(x), plain)
        assert torch.equal(StoredLinear(module.stored)(x), plain)
    finally:
        round_tokens(False)


def test_a_head_in_codes_leaves_a_missing_embedding_its_floats(tmp_path: Path) -> None:
    """The embedding of a tied model looks its rows up in the head's numbers."""
    coded, _ = write_pair("fp8", tmp_path)
    folder = tmp_path / "tied"
    shutil.copytree(coded, folder)
    config = (folder / "config.json").read_text()
    wanted = '"tie_word_embeddings": false'
    assert wanted in config
    (folder / "config.json").write_text(config.replace(wanted, '"tie_word_embeddings": true'))
    weights = load_file(folder / "model.safetensors")
    table = weights.pop("model.embed_tokens.weight").float()
    weights["lm_head.weight"] = table.to(torch.float8_e4m3fn)
    weights["lm_head.weight_scale_inv"] = torch.ones(3, 1)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    loader, skeleton = loaded(folder)
    assert "lm_head.weight" not in loader.kept_bytes and loader.kept_bytes
    found = skeleton.model.get_input_embeddings().weight
    assert torch.equal(found, weights["lm_head.weight"].float())
    assert skeleton.model.lm_head.weight is found
    assert loader.held_bytes == held(skeleton)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_code_of_nan_is_refused(code: int, tmp_path: Path) -> None:
    coded, _ = write_pair("fp8", tmp_path)
    weights = load_file(coded / "model.safetensors")
    weights[f"{O_PROJ}.weight"].view(torch.uint8)[3, 5] = code
    save_file(weights, coded / "model.safetensors", {"format": "pt"})
    with pytest.raises(CorruptArtifactError, match=f"'{O_PROJ}.weight' stands for NaN"):
        loaded(coded)
