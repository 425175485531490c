"""GGUF files read like the checkpoints that they stand for: bit for bit, and token for token."""

import itertools
import json
import re
import shutil
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedConfig

from moe_tool.errors import CorruptArtifactError, MoeToolError
from moe_tool.models.stored_formats.registry import open_checkpoint
from tests.gguf_file import Floats, GgufData, gguf_bytes, random_tensor
from tests.models.stored_formats.test_coded_models import _SHAPE, gpt_oss, qwen3_moe, run_beside
from tests.models.stored_formats.test_decoding import HeldBytes
from tests.tiny_models import tiny_tokenizer

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


def mixtral() -> PreTrainedConfig:
    return MixtralConfig(**_SHAPE, intermediate_size=32, num_local_experts=8)


def permuted(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows as llama.cpp has them: each head's halves in turns."""
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


NAMES = {
    "model.embed_tokens.": "token_embd.",
    "model.norm.": "output_norm.",
    "lm_head.": "output.",
    "model.layers.": "blk.",
    "self_attn.sinks": "attn_sinks.weight",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "mlp.gate.": "ffn_gate_inp.",
    "mlp.router": "ffn_gate_inp",
    "block_sparse_moe.gate.": "ffn_gate_inp.",
}
ONE_EXPERT = re.compile(r"model\.layers\.(\d+)\.\w+\.experts\.(\d+)\.(\w+)\.weight")
PARTS = {"w1": "gate", "w3": "up", "w2": "down"} | {
    f"{part}_proj": part for part in ("gate", "up", "down")
}


class Converted:
    """Tensors of a GGUF file with random codes, and the weights that they stand for."""

    def __init__(
        self, config: PreTrainedConfig, weights: dict[str, Floats], kinds: Sequence[str]
    ) -> None:
        self._kinds = itertools.cycle(kinds)
        self.tensors: dict[str, GgufData] = {}
        self.plain = dict(weights)
        self._rng = np.random.default_rng(3)
        self._config = config
        stacks: dict[str, dict[int, str]] = {}
        for name in weights:
            match = ONE_EXPERT.fullmatch(name)
            if match:
                called = f"blk.{match[1]}.ffn_{PARTS[match[3]]}_exps.weight"
                stacks.setdefault(called, {})[int(match[2])] = name
            elif ".experts." in name:
                self._add_fused(name)
            else:
                self._add_plain(name)
        for called, names in stacks.items():
            shape = (len(names), *weights[names[0]].shape)
            self.tensors[called], made = random_tensor(self._rng, next(self._kinds), *shape)
            for expert, name in names.items():
                self.plain[name] = made[expert]

    def _add_plain(self, name: str) -> None:
        called = name
        for theirs, ours in NAMES.items():
            called = called.replace(theirs, ours)
        called = re.sub(r"self_attn\.([qkv])_proj", r"attn_\1", called)
        norm = "post_attention_norm" if self._config.model_type == "gpt_oss" else "ffn_norm"
        called = called.replace("post_attention_layernorm", norm)
        values = self.plain[name]
        tensor = GgufData(kind="F32", data=values)
        if values.ndim == 2 and "ffn_gate_inp" not in called:
            tensor, self.plain[name] = random_tensor(self._rng, "Q8_0", *values.shape)
        heads = {"q": self._config.num_attention_heads, "k": self._config.num_key_value_heads}
        match = re.search(r"attn_([qk])\.", called)
        if match and self._config.model_type == "mixtral":
            tensor = GgufData(kind=tensor.kind, data=permuted(tensor.data, heads[match[1]]))
        self.tensors[called] = tensor

    def _add_fused(self, name: str) -> None:
        """gpt-oss's matrices [E, in, out]: gate and up are its even and odd outputs."""
        layer = re.search(r"layers\.(\d+)\.", name)
        assert layer is not None
        ending = "bias" if name.endswith("_bias") else "weight"
        values = self.plain[name].copy()
        outputs = (
            {"down": values}
            if "down" in name
            else {
                "gate": values[..., 0::2],
                "up": values[..., 1::2],
            }
        )
        for part, view in outputs.items():
            called = f"blk.{layer[1]}.ffn_{part}_exps.{ending}"
            if ending == "bias":
                self.tensors[called] = GgufData(kind="F32", data=np.ascontiguousarray(view))
                continue
            experts, n_in, n_out = view.shape
            kind = next(self._kinds)
            self.tensors[called], made = random_tensor(self._rng, kind, experts, n_out, n_in)
            view[:] = made.swapaxes(1, 2)
        self.plain[name] = values


MODELS: dict[str, tuple[str, Callable[[], PreTrainedConfig]]] = {
    "qwen3_moe": ("qwen3moe", qwen3_moe),
    "mixtral": ("llama", mixtral),
    "gpt_oss": ("gpt-oss", gpt_oss),
}


def tiny_wide() -> PreTrainedConfig:
    """One layer of four experts, whose rows are whole blocks of every type."""
    return wide(qwen3_moe, num_hidden_layers=1, num_experts=4)


def wide(configure: Callable[[], PreTrainedConfig], **changed: int) -> PreTrainedConfig:
    """A model whose rows are whole blocks of every type."""
    config = configure()
    for key in ("hidden_size", "moe_intermediate_size", "intermediate_size"):
        if hasattr(config, key):
            setattr(config, key, 256)
    for key, value in changed.items():
        setattr(config, key, value)
    return config


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertedModel:
    """Folders of a GGUF file and of the float32 checkpoint that it stands for."""

    coded: Path
    plain: Path
    config: dict[str, Any]
    metadata: dict[str, object]
    tensors: dict[str, GgufData]


def write_pair(name: str, folder: Path) -> tuple[Path, Path]:
    """Write a folder with a GGUF file, and the float32 checkpoint that it stands for."""
    made = converted_model(name, folder, kinds=("MXFP4" if name == "gpt_oss" else "Q8_0",))
    return made.coded, made.plain


def converted_model(
    name: str,
    folder: Path,
    *,
    kinds: Sequence[str],
    configure: Callable[[], PreTrainedConfig] | None = None,
) -> ConvertedModel:
    """Write a tiny random model; `kinds` are the types of experts' tensors, in turns."""
    architecture, usual = MODELS[name]
    plain, coded = folder / "plain", folder / "coded"
    torch.manual_seed(3)
    config = (configure or usual)()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(1.0 if weight.ndim == 1 else 0.0, 0.2)
    model.generation_config.eos_token_id = None
    model.save_pretrained(plain)
    file = plain / "model.safetensors"
    weights = {key: tensor.numpy() for key, tensor in load_file(file).items()}
    made = Converted(config, weights, kinds)
    assert any(not np.array_equal(made.plain[key], weights[key]) for key in weights)
    save_file(
        {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in made.plain.items()},
        file,
        {"format": "pt"},
    )
    coded.mkdir()
    metadata: dict[str, object] = {
        "general.architecture": architecture,
        "tokenizer.ggml.tokens": ["a", "b"],
    }
    (coded / f"{name}-{kinds[0]}.gguf").write_bytes(gguf_bytes(metadata, made.tensors))
    shutil.copy(plain / "config.json", coded)
    tiny_tokenizer().save_pretrained(coded)
    return ConvertedModel(
        coded=coded,
        plain=plain,
        config=json.loads((plain / "config.json").read_text()),
        metadata=metadata,
        tensors=made.tensors,
    )


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
