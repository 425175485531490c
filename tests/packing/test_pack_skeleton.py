"""A skeleton below native holds the codes of its matrices, and everything else as it was."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moe_tool.artifacts.precision import IntegerPrecision, NativePrecision
from moe_tool.errors import CorruptArtifactError, UsageError
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.formats.bundle_writer import BundleWriter
from moe_tool.models.locate import LocatedModel
from moe_tool.packing import skeleton_work
from moe_tool.packing.write_bundle import PackReport
from moe_tool.quantization.round_to_nearest import quantize
from tests.packed import pack_bundle

# Counted by hand from tests/tiny_models.py: three layers of attention and of dense or shared
# multi-layer perceptrons (three matrices each), and the head.
N_LINEARS = {
    "mixtral": 3 * 4 + 1,
    "qwen2_moe": 3 * (4 + 3) + 1,  # shared experts; their one-output gates stay
    "qwen3_moe": 3 * 4 + 3 + 1,  # layer 1 is dense
    "olmoe": 3 * 4 + 1,
    "phimoe": 3 * 4 + 1,  # its routers are made from nn.Linear
    "granitemoe": 3 * 4 + 1,
    "deepseek_v2": 3 * (5 + 3) + 1,  # latent attention: q_a, q_b, kv_a, kv_b, o
    "deepseek_v3": 3 * (5 + 3) + 1,
    "glm4_moe": 3 * (4 + 3) + 1,
    "ernie4_5_moe": 3 * (4 + 3) + 1,
    "minimax_m2": 3 * 4 + 1,
    "hunyuan_v1_moe": 3 * (4 + 3) + 1,  # its routers hold an nn.Linear
    "gpt_oss": 3 * 4 + 1,
}


def pack(folder: Path, out: Path, bits: str) -> PackReport:
    return pack_bundle(LocatedModel(folder=folder, name="tiny"), out=out, skeleton_bits=bits)


def skeleton_of(bundle: Path) -> dict[str, torch.Tensor]:
    return load_file(bundle / "skeleton-00001.safetensors")


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("arch", N_LINEARS)
def test_the_codes_are_those_of_the_models_parameters(
    arch: str, bits: int, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_checkpoint(arch, "bfloat16")
    report = pack(folder, tmp_path / "b", str(bits))
    # transformers' own conversion is the second opinion on what a parameter is.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with BundleReader.open(tmp_path / "b") as reader:
        manifest = reader.manifest
        reader.verify_all()
    found = skeleton_of(tmp_path / "b")
    assert manifest.skeleton_precision == IntegerPrecision(width_bits=8 if bits == 8 else 4)
    assert len(manifest.skeleton_linears) == N_LINEARS[arch]
    for linear in manifest.skeleton_linears:
        wanted = quantize(parameters[linear.parameter].detach(), bits)
        assert (linear.n_outputs, linear.n_inputs) == wanted.shape
        for index, plane in enumerate(wanted.planes):
            assert torch.equal(found.pop(f"{linear.parameter}.plane{index}"), plane)
        assert torch.equal(found.pop(f"{linear.parameter}.scales"), wanted.scales)
    stored = load_file(folder / "model.safetensors")
    assert found.keys() < stored.keys()
    for name, tensor in found.items():
        assert tensor.dtype == stored[name].dtype and torch.equal(tensor, stored[name])
    assert report.skeleton_bits == str(bits)
    native = sum(tensor.nbytes for name, tensor in stored.items() if "experts." not in name)
    assert report.skeleton_bytes < native


@pytest.mark.parametrize("arch", N_LINEARS)
def test_what_decides_stays_in_full_precision(
    arch: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    pack(tiny_checkpoint(arch), tmp_path / "b", "4")
    codes = {name for name in skeleton_of(tmp_path / "b") if name.endswith(".scales")}
    words = (".gate.", ".router.", ".wg.", "_gate.", "embed", "norm", "bias")
    assert not [name for name in codes if any(word in name for word in words)]
    with BundleReader.open(tmp_path / "b") as reader:
        linears = reader.manifest.skeleton_linears
    assert not [linear for linear in linears if linear.n_outputs == 1]


def test_a_tied_head_gets_codes_beside_the_table(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    pack(tiny_checkpoint("granitemoe"), tmp_path / "b", "8")
    found = skeleton_of(tmp_path / "b")
    table = load_file(tiny_checkpoint("granitemoe") / "model.safetensors")[
        "model.embed_tokens.weight"
    ]
    assert torch.equal(found["model.embed_tokens.weight"], table)
    assert torch.equal(found["lm_head.weight.plane0"], quantize(table, 8).planes[0])


def test_a_table_that_only_its_head_holds_is_kept(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """A checkpoint may hold a tied pair under the other name; codes alone would lose the table."""
    folder = Path(shutil.copytree(tiny_checkpoint("granitemoe"), tmp_path / "m"))
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    pack(folder, tmp_path / "b", "8")
    found = skeleton_of(tmp_path / "b")
    assert torch.equal(found["lm_head.weight"], weights["lm_head.weight"])
    assert "lm_head.weight.plane0" not in found
    assert "model.layers.0.self_attn.q_proj.weight.plane0" in found


def test_native_is_the_default_and_stores_no_codes(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_checkpoint("mixtral")
    pack_bundle(LocatedModel(folder=folder, name="tiny"), out=tmp_path / "b")
    with BundleReader.open(tmp_path / "b") as reader:
        assert reader.manifest.skeleton_precision == NativePrecision()
        assert reader.manifest.skeleton_linears == ()
    stored = load_file(folder / "model.safetensors")
    for name, tensor in skeleton_of(tmp_path / "b").items():
        assert torch.equal(tensor, stored[name])


def test_blocks_of_rows_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(75, 70, generator=torch.Generator().manual_seed(1))
    precision = IntegerPrecision(width_bits=4)
    monkeypatch.setattr(skeleton_work, "_BLOCK_WEIGHTS", 32 * 70)  # 32, 32 and 11 rows
    found, wanted = skeleton_work._quantize(weight, precision), quantize(weight, 4)
    assert found.shape == wanted.shape == (75, 70)
    assert torch.equal(found.scales, wanted.scales)
    for plane, other in zip(found.planes, wanted.planes, strict=True):
        assert torch.equal(plane, other)


def test_the_same_inputs_give_the_same_bytes_and_other_bits_are_refused(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint("mixtral")
    pack(folder, tmp_path / "whole", "4")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(BundleWriter, "write_skeleton", killed)
        with pytest.raises(KeyboardInterrupt):
            pack(folder, tmp_path / "b", "4")
    for bits in ("native", "8"):
        with pytest.raises(UsageError, match=f"skeleton_bits '4', now '{bits}' is asked for"):
            pack(folder, tmp_path / "b", bits)
    assert pack(folder, tmp_path / "b", "4").resumed_records == 24
    for path in sorted((tmp_path / "whole").iterdir()):
        assert (tmp_path / "b" / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(UsageError, match="skeleton_bits '4', now '8' is asked for"):
        pack(folder, tmp_path / "b", "8")
    with pytest.raises(UsageError, match="--skeleton-bits 5 is not known"):
        pack(folder, tmp_path / "c", "5")


def test_a_weight_that_is_no_number_is_named(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint("mixtral"), tmp_path / "m"))
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][3, 5] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CorruptArtifactError, match=r"'lm_head\.weight' holds NaN"):
        pack(folder, tmp_path / "b", "8")
    assert not (tmp_path / "b").exists()
