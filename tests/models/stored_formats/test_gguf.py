"""GGUF files read like the checkpoints that they stand for: bit for bit, and token for token."""

import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moe_tool.errors import CorruptArtifactError, MoeToolError
from moe_tool.models.stored_formats.registry import open_checkpoint
from tests.gguf_file import GgufData, gguf_bytes, random_tensor
from tests.models.stored_formats.converted_gguf import (
    MODELS,
    converted_model,
    wide,
    write_pair,
)
from tests.models.stored_formats.test_coded_models import run_beside
from tests.models.stored_formats.test_decoding import HeldBytes

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_0", "Q4_K", "Q5_K", "Q6_K", "MXFP4")
QWEN = {"model_type": "qwen3_moe"}
EXPERT = "model.layers.1.mlp.experts.{}.up_proj.weight"


def opened(folder: Path, tensors: dict[str, GgufData], config: Any = QWEN, **metadata: Any) -> Any:
    known = {"general.architecture": "qwen3moe"} | metadata
    (folder / "m.gguf").write_bytes(gguf_bytes(known, tensors))
    return open_checkpoint(folder, config)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_another_decoder(kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    one, weights = random_tensor(rng, kind, 40, 512)
    stack, experts = random_tensor(rng, kind, 3, 8, 256)
    tensors = {"blk.0.attn_q.weight": one, "blk.1.ffn_up_exps.weight": stack}
    name = "model.layers.0.self_attn.q_proj.weight"
    with opened(tmp_path, tensors) as checkpoint:
        assert sorted(checkpoint.tensors) == sorted([name, *(EXPERT.format(k) for k in range(3))])
        assert checkpoint.tensors[name].shape == (40, 512)
        assert np.array_equal(checkpoint.read(name).numpy(), weights)
        heard: list[tuple[str, int | None, int]] = []
        checkpoint.on_read = lambda name, row, view: heard.append((name, row, len(view)))
        assert np.array_equal(checkpoint.read(EXPERT.format(2)).numpy(), experts[2])
        assert heard == [("blk.1.ffn_up_exps.weight", 2, stack.data.nbytes // 3)]


def halves(codes: torch.Tensor) -> torch.Tensor:
    """Codes in pairs as llama.cpp has them: the first sixteen of a block low, the others high."""
    wide = torch.stack((codes & 15, codes >> 4), dim=-1).view(len(codes), -1, 2, 16)
    return wide[..., 0, :] | wide[..., 1, :] << 4


@pytest.mark.parametrize("kind", KINDS)
def test_kept_codes_stand_for_the_same_weights(kind: str, tmp_path: Path) -> None:
    stack, experts = random_tensor(np.random.default_rng(5), kind, 3, 8, 512)
    with opened(tmp_path, {"blk.1.ffn_up_exps.weight": stack}) as checkpoint:
        kept = checkpoint.read_kept(EXPERT.format(2))
    assert (kept is None) == (kind in ("F32", "F16", "BF16"))
    if kept is None:
        return
    assert np.array_equal(kept.decode().numpy(), experts[2])
    bits = {"int4": 4, "e2m1": 4, "int8": 8}[kept.kind]
    assert bits == (4 if kind in ("Q4_0", "Q4_K", "MXFP4") else 8)
    assert kept.codes.nbytes * 8 == bits * experts[2].size
    if kind in ("Q8_0", "Q4_0", "MXFP4"):
        scale = kept.scale.view(torch.uint8).view(8, 16, -1)
        codes = (kept.codes ^ 128).view(8, 16, 32) if kind == "Q8_0" else halves(kept.codes)
        made = torch.cat((scale, codes), dim=-1).view(8, -1)
        assert np.array_equal(made.numpy(), stack.data[2])


@pytest.mark.parametrize(
    ("kinds", "codes", "group"),
    [
        (("Q4_K", "Q6_K"), "int8", 16),
        (("Q4_K", "Q5_K"), "int8", 32),
        (("Q4_0", "Q5_0"), "int8", 32),
        (("Q4_0", "Q6_K", "Q8_0"), "int8", 16),
        (("Q5_0", "Q5_K", "Q6_K", "Q8_0", "Q4_0"), "int8", 16),
        (("MXFP4", "Q8_0"), None, 0),
        (("F16", "Q8_0"), None, 0),
    ],
)
def test_experts_of_several_types_are_kept_in_one_form(
    kinds: tuple[str, ...], codes: str | None, group: int, tmp_path: Path
) -> None:
    rng, tensors, weights = np.random.default_rng(5), {}, []
    for layer, kind in enumerate(kinds):
        tensors[f"blk.{layer}.ffn_up_exps.weight"], made = random_tensor(rng, kind, 2, 8, 512)
        weights.append(made)
    with opened(tmp_path, tensors) as checkpoint:
        name = "model.layers.{}.mlp.experts.1.up_proj.weight"
        found = [checkpoint.read_kept(name.format(layer)) for layer in range(len(kinds))]
    if codes is None:
        assert None in found
        return
    assert (
        len({(kept.kind, kept.group, kept.scale.dtype, kept.zero is None) for kept in found}) == 1
    )
    assert (found[0].kind, found[0].group) == (codes, (1, group))
    for kept, wanted in zip(found, weights, strict=True):
        assert np.array_equal(kept.decode().numpy(), wanted[1])


@pytest.mark.parametrize("kind", ["MXFP4", "Q4_K"])
def test_gate_and_up_are_kept_in_turns(kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    gate, gates = random_tensor(rng, kind, 3, 8, 256)
    up, ups = random_tensor(rng, kind, 3, 8, 256)
    metadata = {"general.architecture": "gpt-oss"}
    with opened(tmp_path, {GATE: gate, UP: up}, OSS, **metadata) as checkpoint:
        name = "model.layers.0.mlp.experts.gate_up_proj"
        kept = checkpoint.read_kept(name, row=2)
        wanted = np.stack((gates[2], ups[2]), axis=1).reshape(16, 256)
        assert np.array_equal(kept.decode().numpy(), wanted)
        assert np.array_equal(checkpoint.read(name, row=2).numpy(), wanted.T)


@pytest.mark.parametrize("kind", ["BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K", "MXFP4"])
def test_what_decoding_holds_is_announced(kind: str, tmp_path: Path) -> None:
    one, _ = random_tensor(np.random.default_rng(5), kind, 2048, 1024)
    with opened(tmp_path, {"output.weight": one}) as checkpoint:
        checkpoint.read("lm_head.weight")  # imports the library
        tracemalloc.start()
        with HeldBytes() as held:
            made = checkpoint.read("lm_head.weight")
        traced = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        announced = made.nbytes + checkpoint.extra_bytes("lm_head.weight")
    assert 0.7 * announced < held.most + traced < announced + 2**16, (held.most, traced, announced)


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_the_plain_model(name: str, tmp_path: Path) -> None:
    coded, plain = write_pair(name, tmp_path)
    run_beside(coded, plain, tmp_path)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [("qwen3_moe", ("Q4_K", "Q6_K")), ("mixtral", ("Q4_0",)), ("gpt_oss", ("Q6_K",))],
)
def test_tokens_of_other_types(name: str, kinds: tuple[str, ...], tmp_path: Path) -> None:
    made = converted_model(name, tmp_path, kinds=kinds, configure=lambda: wide(MODELS[name][1]))
    run_beside(made.coded, made.plain, tmp_path)
    manifest = (tmp_path / "bundle" / "manifest.json").read_text()
    assert '"kept"' in manifest


def test_config_of_a_checkpoint_in_another_format(tmp_path: Path) -> None:
    """gpt-oss's config.json says MXFP4 in safetensors; the file beside it says more."""
    coded, plain = write_pair("gpt_oss", tmp_path)
    config = json.loads((coded / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (coded / "config.json").write_text(json.dumps(config))
    run_beside(coded, plain, tmp_path)


def tensor(*shape: int, kind: str = "F32") -> GgufData:
    return random_tensor(np.random.default_rng(1), kind, *shape)[0]


MIXTRAL = {"model_type": "mixtral", "num_attention_heads": 4, "num_key_value_heads": 2}
OSS = {"model_type": "gpt_oss"}
GATE, UP = "blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight"
Q = "blk.0.attn_q.weight"
REFUSED: dict[str, tuple[dict[str, Any], str, dict[str, GgufData], str]] = {
    "another model": ({"model_type": "olmoe"}, "olmoe", {}, "architecture 'olmoe' beside"),
    "another file": (QWEN, "llama", {}, "'llama' beside a config.json of 'qwen3_moe'"),
    "no type": ({}, "llama", {}, "config.json of 'None'"),
    "a part": (QWEN, "qwen3moe", {"blk.0.ssm_a": tensor(4)}, "'blk.0.ssm_a' is no part of"),
    "a long number": (QWEN, "qwen3moe", {"blk.123456.attn_q.weight": tensor(4)}, "is no part"),
    "old experts": (MIXTRAL, "llama", {"blk.0.ffn_gate.3.weight": tensor(4)}, "is no part"),
    "frequencies": (MIXTRAL, "llama", {"rope_freqs.weight": tensor(4)}, "is no part"),
    "no stack": (QWEN, "qwen3moe", {UP: tensor(4, 32)}, "is no part"),
    "sinks": (QWEN, "qwen3moe", {"blk.0.attn_sinks.weight": tensor(4)}, "is no part"),
    "heads": (MIXTRAL, "llama", {Q: tensor(12, 32)}, "has 12 rows for 4 heads"),
    "no heads": (MIXTRAL | {"num_attention_heads": 0}, "llama", {Q: tensor(8, 32)}, "0 heads"),
    "head list": (MIXTRAL | {"num_attention_heads": [4]}, "llama", {Q: tensor(8, 32)}, "heads"),
    "gate alone": (OSS, "gpt-oss", {GATE: tensor(2, 4, 32)}, "lacks its part .*up_exps"),
    "up alone": (OSS, "gpt-oss", {UP: tensor(2, 4, 32)}, "lacks its part .*gate_exps"),
    "unequal": (
        OSS,
        "gpt-oss",
        {GATE: tensor(2, 4, 32, kind="Q8_0"), UP: tensor(2, 6, 32)},
        r"has shape \[2, 6, 32\], wanted \[2, 4, 32\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_that_of_the_model_is_refused(case: str, tmp_path: Path) -> None:
    config, architecture, tensors, words = REFUSED[case]
    metadata = {"general.architecture": architecture}
    with pytest.raises(MoeToolError, match=words) as caught:
        opened(tmp_path, tensors, config, **metadata)
    assert caught.value.exit_code == 3 and caught.value.hint


def test_several_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MoeToolError, match="in several GGUF files, one of them m.gguf") as caught:
        opened(tmp_path, {}, **{"split.count": 2})
    assert "llama-gguf-split --merge" in (caught.value.hint or "")
    shutil.copy(tmp_path / "m.gguf", tmp_path / "mmproj.gguf")
    with pytest.raises(MoeToolError, match="in several GGUF files"):
        open_checkpoint(tmp_path, QWEN)


def test_numbers_that_are_none_are_refused_when_read(tmp_path: Path) -> None:
    broken = tensor(4, 32, kind="Q8_0")
    broken.data[2, :2] = [0, 0x7E]
    with (
        opened(tmp_path, {"output.weight": broken}) as checkpoint,
        pytest.raises(CorruptArtifactError, match=r"'lm_head\.weight' stands for NaN"),
    ):
        checkpoint.read("lm_head.weight")


def test_safetensors_go_before_a_file_beside_them(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    with opened(tmp_path, {}) as checkpoint:
        assert list(checkpoint.tensors) == ["a.weight"]
