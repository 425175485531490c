"""A quantized checkpoint's attention and shared experts lie in the bundle as they lie on disk."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moe_tool.artifacts.bundle_manifest import BundleManifest
from moe_tool.errors import CorruptArtifactError, MoeToolError
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.formats.finite_numbers import are_finite_codes
from moe_tool.formats.json_artifact import read_json_artifact, write_json_artifact
from moe_tool.models.bundle_skeleton import matrix_bytes, n_skeleton_weights, open_bundle_skeleton
from moe_tool.packing import write_bundle
from moe_tool.runtime.decoding_config import GenerateOptions
from moe_tool.runtime.generation import generate_ids
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import open_session
from tests.models.stored_formats.test_coded_models import N_TOKENS, PROMPT, write_pair
from tests.packed import pack_bundle
from tests.packing.test_pack_bundle import located

CODED = ("fp8", "int4", "nvfp4")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Return name -> a coded checkpoint, and the one in float32 that it stands for."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(name: str) -> tuple[Path, Path]:
        if name not in made:
            made[name] = write_pair(name, tmp_path_factory.mktemp(name))
        return made[name]

    return make


def raw_skeleton(folder: Path) -> dict[str, torch.Tensor]:
    """Everything but routed experts, and but scales of activations, which nothing uses."""
    weights = load_file(folder / "model.safetensors")
    unused = ("input_scale", "weight_shape")
    return {
        name: tensor
        for name, tensor in weights.items()
        if ".experts." not in name and not name.endswith(unused)
    }


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    is_alike = one.dtype == other.dtype and one.shape == other.shape
    return is_alike and torch.equal(
        one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8)
    )


@pytest.mark.parametrize("name", CODED)
def test_the_skeleton_is_byte_for_byte_the_checkpoints(
    name: str, pair: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    coded, plain = pair(name)
    report = pack_bundle(located(coded), out=tmp_path / "b")
    wanted, found = raw_skeleton(coded), load_file(tmp_path / "b" / "skeleton-00001.safetensors")
    assert found.keys() == wanted.keys()
    assert all(same_bytes(found[each], wanted[each]) for each in wanted)
    assert any(not t.is_floating_point() or t.element_size() == 1 for t in found.values())
    assert report.skeleton_bytes == sum(tensor.nbytes for tensor in wanted.values())
    # Codes are multiplied as they are, those of the checkpoint were decoded first.
    assert report.proof is not None and report.proof.rule == "close"
    assert 0 < report.proof.difference < 1e-6
    floats = raw_skeleton(plain)
    with BundleReader.open(tmp_path / "b") as reader:
        reader.verify_all()
        # A row has a scale of its own where the checkpoint has one for several.
        experts = {
            n: t for n, t in load_file(coded / "model.safetensors").items() if n not in found
        }
        stored = sum(t.nbytes for n, t in experts.items() if ".experts." in n)
        (held,) = reader.forms
        content = sum(segment.n_bytes for segment in held.form.layout.segments)
        rows = sum(t.shape[0] for t in reader.manifest.shape.expert_tensors)
        assert len(held.table.records) * (content - 4 * rows) <= stored
        with open_bundle_skeleton(reader) as skeleton:
            assert skeleton.tensors.keys() == floats.keys()
            for each, tensor in floats.items():
                assert torch.equal(skeleton.read(each).float(), tensor)
        assert n_skeleton_weights(reader) == sum(math.prod(t.shape) for t in floats.values())
        coded_names = floats.keys() - {n for n, t in wanted.items() if t.dtype == torch.bfloat16}
        assert coded_names
        # A run multiplies codes as they lie; NVFP4's whole scale is repeated for every output.
        repeated = sum(4 * (floats[n].shape[0] - 1) for n in coded_names if name == "nvfp4")
        table = wanted["model.embed_tokens.weight"].nbytes
        assert matrix_bytes(reader) == report.skeleton_bytes - table + repeated


def tokens_of(bundle: Path) -> list[int]:
    options = run_options(memory="min", context=64, prompt_tokens=32)
    with open_session(bundle, options) as session:
        decode = GenerateOptions(max_tokens=N_TOKENS, ignore_eos=True)
        return list(generate_ids(session, [PROMPT], decode).token_ids[0])


def test_settings_in_a_file_of_their_own_come_along(
    pair: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """As ModelOpt writes them: hf_quant_config.json beside a plain config.json."""
    coded, plain = pair("nvfp4")
    folder = tmp_path / "m"
    folder.mkdir()
    for path in coded.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "hf_quant_config.json").write_text(
        json.dumps({"producer": {"name": "modelopt"}, "quantization": settings})
    )
    pack_bundle(located(folder), out=tmp_path / "b")
    model = AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        wanted = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=N_TOKENS,
            do_sample=False,
        )
    assert tokens_of(tmp_path / "b") == wanted[0, len(PROMPT) :].tolist()


def test_rounded_matrices_lie_beside_codes_that_stay(
    pair: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """A router in FP8 is no matrix to be rounded; its codes are kept."""
    coded, _ = pair("fp8")
    folder = tmp_path / "m"
    folder.mkdir()
    for path in coded.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    router = "model.layers.1.mlp.gate.weight"
    weights[router] = weights[router].to(torch.float8_e4m3fn)
    weights[f"{router}_scale_inv"] = torch.ones(1, 1)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    report = pack_bundle(located(folder), out=tmp_path / "b", skeleton_bits="8")
    found = load_file(tmp_path / "b" / "skeleton-00001.safetensors")
    assert same_bytes(found[router], weights[router]) and f"{router}_scale_inv" in found
    assert "model.layers.0.self_attn.o_proj.weight.plane0" in found
    assert "model.layers.0.self_attn.o_proj.weight" not in found
    assert report.proof is not None and 0 < report.proof.kl < 1
    assert len(tokens_of(tmp_path / "b")) == N_TOKENS


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_codes_of_nan_are_refused_as_they_are_copied(
    code: int,
    pair: Callable[[str], tuple[Path, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(pair("fp8")[0], folder)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    weights[name].view(torch.uint8)[3, 5] = code
    save_file(weights, folder / "model.safetensors", {"format": "pt"})

    def unproven(*_: object, **__: object) -> None:
        raise AssertionError("the copy went through")

    monkeypatch.setattr(write_bundle, "prove_bundle", unproven)
    with pytest.raises(CorruptArtifactError, match=f"'{name}' stands for NaN") as caught:
        pack_bundle(located(folder), out=tmp_path / "b")
    assert caught.value.exit_code == 3 and not (tmp_path / "b").exists()


def test_every_code_of_eight_bits_is_judged_as_torch_does() -> None:
    for dtype, name in (
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
        (torch.float8_e8m0fnu, "F8_E8M0"),
    ):
        every = torch.arange(256, dtype=torch.uint8)
        wanted = every.view(dtype).to(torch.float32).isfinite().tolist()
        assert [are_finite_codes(bytes([k]), name) for k in range(256)] == wanted
    assert are_finite_codes(b"\xff\x7f", "U8")


def forge(bundle: Path, change: Callable[[dict], None]) -> None:
    """Change config.json, with a manifest that says so."""
    path = bundle / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    manifest = read_json_artifact(bundle / "manifest.json", BundleManifest)
    size, sha256 = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
    files = [
        file.model_copy(update={"size_bytes": size, "sha256": sha256})
        if file.name == "config.json"
        else file
        for file in manifest.files
    ]
    forged = manifest.model_copy(update={"files": tuple(files)})
    write_json_artifact(bundle / "manifest.json", forged)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.pop("quantization_config"), "F8_E4M3|does not use"),
        (
            lambda config: config["quantization_config"].update(weight_block_size=[64, 64]),
            "skeleton of .* wants",
        ),
        (
            lambda config: config["quantization_config"].update(quant_method="unheard-of"),
            "unheard-of",
        ),
    ],
)
def test_codes_that_the_config_does_not_explain_are_refused(
    change: Callable[[dict], None],
    message: str,
    pair: Callable[[str], tuple[Path, Path]],
    tmp_path: Path,
) -> None:
    pack_bundle(located(pair("fp8")[0]), out=tmp_path / "b")
    forge(tmp_path / "b", change)
    with pytest.raises(MoeToolError, match=message) as caught:
        tokens_of(tmp_path / "b")
    assert caught.value.exit_code == 3 and caught.value.hint is not None


def test_a_damaged_scale_is_found(pair: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    pack_bundle(located(pair("fp8")[0]), out=tmp_path / "b")
    name = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    with BundleReader.open(tmp_path / "b") as reader:
        info = reader.open_skeleton().tensors[name]
    with open(info.file, "r+b") as file:
        file.seek(info.offset)
        file.write(b"\x00\x00\x00\x01")
    with pytest.raises(CorruptArtifactError, match=f"hash of '{name}' does not fit"):
        tokens_of(tmp_path / "b")
