"""Tiny random models as GGUF files, beside the float32 checkpoints that they stand for."""

import itertools
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedConfig

from tests.gguf_file import Floats, GgufData, gguf_bytes, random_tensor
from tests.models.stored_formats.test_coded_models import _SHAPE, gpt_oss, qwen3_moe
from tests.tiny_models import tiny_tokenizer


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
