"""Random checkpoints of the shapes that people run, written shard by shard.

    python benchmarks/real_checkpoints.py gpt-oss-20b FOLDER
    python benchmarks/real_checkpoints.py qwen3-30b FOLDER --layers 16 [--dtype fp8]

Weights are slices of one pool of random numbers, so that writing costs what the disk costs. The
tokenizer is the embedded model's; ids beyond it are in the embedding and never used.
"""

import argparse
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from random_models import TOKENIZER

SHAPES = ("gpt-oss-20b", "qwen3-30b")
_POOL_VALUES = 2**26
_E8M0_OF_ONE = 127
_BLOCK = 128
_ITEM_BYTES = {"BF16": 2, "F32": 4, "U8": 1, "F8_E4M3": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tensor:
    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: str = "weight"
    """weight, codes, exponents, scale or norm"""

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


class _Pool:
    """Random bytes of each kind, handed out from random places."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self._draw = draw
        normal = torch.randn(_POOL_VALUES, generator=draw)
        self._floats = normal.bfloat16()
        self._fp8 = (normal * 100).clamp(-440, 440).to(torch.float8_e4m3fn)
        self._codes = torch.randint(0, 256, (_POOL_VALUES,), dtype=torch.uint8, generator=draw)

    def blocks(self, tensor: _Tensor) -> Iterator[bytes]:
        """Yield the bytes of a tensor."""
        n_values, width = math.prod(tensor.shape), tensor.shape[-1]
        if tensor.kind in ("norm", "scale"):
            value = 1.0 if tensor.kind == "norm" else 0.01 * (_BLOCK * width) ** -0.5
            torch_dtype = torch.float32 if tensor.dtype == "F32" else torch.bfloat16
            yield _bytes(torch.full(tensor.shape, value, dtype=torch_dtype))
            return
        if tensor.kind == "exponents":  # codes have a standard deviation of about 3
            exponent = _E8M0_OF_ONE - round(math.log2(3 * (32 * width) ** 0.5))
            yield _bytes(torch.full(tensor.shape, exponent, dtype=torch.uint8))
            return
        pool = {"codes": self._codes, "fp8": self._fp8}.get(tensor.kind, self._floats)
        while n_values > 0:
            start = int(torch.randint(0, _POOL_VALUES // 2, (), generator=self._draw))
            part = pool[start : start + min(n_values, _POOL_VALUES // 2)]
            n_values -= part.numel()
            yield _bytes(part * width**-0.5 if tensor.kind == "weight" else part)


def _bytes(values: torch.Tensor) -> bytes:
    return values.contiguous().view(torch.uint8).numpy().tobytes()


def _gpt_oss(layer: int) -> Iterator[_Tensor]:
    prefix, hidden, experts, groups = f"model.layers.{layer}", 2880, 32, 90
    for name, rows, columns in (("q", 4096, hidden), ("k", 512, hidden), ("v", 512, hidden)):
        yield _Tensor(
            name=f"{prefix}.self_attn.{name}_proj.weight", dtype="BF16", shape=(rows, columns)
        )
        yield _Tensor(name=f"{prefix}.self_attn.{name}_proj.bias", dtype="BF16", shape=(rows,))
    yield _Tensor(name=f"{prefix}.self_attn.o_proj.weight", dtype="BF16", shape=(hidden, 4096))
    yield _Tensor(name=f"{prefix}.self_attn.o_proj.bias", dtype="BF16", shape=(hidden,))
    yield _Tensor(name=f"{prefix}.self_attn.sinks", dtype="BF16", shape=(64,))
    yield _Tensor(name=f"{prefix}.mlp.router.weight", dtype="BF16", shape=(experts, hidden))
    yield _Tensor(name=f"{prefix}.mlp.router.bias", dtype="BF16", shape=(experts,))
    for name, rows in (("gate_up_proj", 2 * hidden), ("down_proj", hidden)):
        stem = f"{prefix}.mlp.experts.{name}"
        yield _Tensor(
            name=f"{stem}_blocks", dtype="U8", shape=(experts, rows, groups, 16), kind="codes"
        )
        yield _Tensor(
            name=f"{stem}_scales", dtype="U8", shape=(experts, rows, groups), kind="exponents"
        )
        yield _Tensor(name=f"{stem}_bias", dtype="BF16", shape=(experts, rows))
    yield from _norms(prefix, hidden)


def _qwen3(layer: int, dtype: str) -> Iterator[_Tensor]:
    prefix, hidden, inner = f"model.layers.{layer}", 2048, 768
    attention = (("q", 4096, hidden), ("k", 512, hidden), ("v", 512, hidden), ("o", hidden, 4096))
    for name, rows, columns in attention:
        yield from _matrix(f"{prefix}.self_attn.{name}_proj", rows, columns, dtype)
    for name in ("q_norm", "k_norm"):
        yield _Tensor(
            name=f"{prefix}.self_attn.{name}.weight", dtype="BF16", shape=(128,), kind="norm"
        )
    yield _Tensor(name=f"{prefix}.mlp.gate.weight", dtype="BF16", shape=(128, hidden))
    for expert in range(128):
        stem = f"{prefix}.mlp.experts.{expert}"
        for name, rows, columns in (
            ("gate", inner, hidden),
            ("up", inner, hidden),
            ("down", hidden, inner),
        ):
            yield from _matrix(f"{stem}.{name}_proj", rows, columns, dtype)
    yield from _norms(prefix, hidden)


def _matrix(stem: str, rows: int, columns: int, dtype: str) -> Iterator[_Tensor]:
    if dtype == "bf16":
        yield _Tensor(name=f"{stem}.weight", dtype="BF16", shape=(rows, columns))
        return
    yield _Tensor(name=f"{stem}.weight", dtype="F8_E4M3", shape=(rows, columns), kind="fp8")
    blocks = (-(-rows // _BLOCK), -(-columns // _BLOCK))
    yield _Tensor(name=f"{stem}.weight_scale_inv", dtype="F32", shape=blocks, kind="scale")


def _norms(prefix: str, hidden: int) -> Iterator[_Tensor]:
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield _Tensor(name=f"{prefix}.{name}.weight", dtype="BF16", shape=(hidden,), kind="norm")


def _ends(vocabulary: int, hidden: int) -> Iterator[_Tensor]:
    yield _Tensor(name="model.embed_tokens.weight", dtype="BF16", shape=(vocabulary, hidden))
    yield _Tensor(name="model.norm.weight", dtype="BF16", shape=(hidden,), kind="norm")
    yield _Tensor(name="lm_head.weight", dtype="BF16", shape=(vocabulary, hidden))


def _gpt_oss_config(layers: int) -> dict[str, Any]:
    kinds = [("sliding" if n % 2 == 0 else "full") + "_attention" for n in range(layers)]
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "dtype": "bfloat16",
        "num_hidden_layers": layers,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "vocab_size": 201088,
        "head_dim": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "sliding_window": 128,
        "layer_types": kinds,
        "max_position_embeddings": 131072,
        "rope_theta": 150000.0,
        "tie_word_embeddings": False,
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                *("model.layers.*.self_attn", "model.layers.*.mlp.router"),
                *("model.embed_tokens", "lm_head"),
            ],
        },
    }


def _qwen3_config(layers: int, dtype: str) -> dict[str, Any]:
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "dtype": "bfloat16",
        "num_hidden_layers": layers,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "vocab_size": 151936,
        "head_dim": 128,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 40960,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
    }
    if dtype == "fp8":
        config["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [_BLOCK, _BLOCK],
        }
    return config


def write_checkpoint(kind: str, folder: Path, *, layers: int | None, dtype: str) -> Path:
    """Write a random checkpoint, one shard per layer; return its folder.

    Args:
        kind: one of SHAPES.
        folder: new.
        layers: None: all of them, 24 or 48.
        dtype: bf16 or fp8, of qwen3-30b.
    """
    folder.mkdir(parents=True)
    is_gpt_oss = kind == "gpt-oss-20b"
    layers = layers or (24 if is_gpt_oss else 48)
    config = _gpt_oss_config(layers) if is_gpt_oss else _qwen3_config(layers, dtype)
    pool, weight_map = _Pool(), {}
    shards = [list(_ends(config["vocab_size"], config["hidden_size"]))]
    shards += [list(_gpt_oss(n) if is_gpt_oss else _qwen3(n, dtype)) for n in range(layers)]
    for number, tensors in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / name, tensors, pool)
        weight_map |= {tensor.name: name for tensor in tensors}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def _write_shard(path: Path, tensors: list[_Tensor], pool: _Pool) -> None:
    header, position = {}, 0
    for tensor in tensors:
        offsets = [position, position + tensor.size_bytes]
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": offsets,
        }
        position = offsets[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            for block in pool.blocks(tensor):
                file.write(block)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Write one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--dtype", choices=("bf16", "fp8"), default="bf16")
    given = parser.parse_args()
    write_checkpoint(given.shape, given.folder, layers=given.layers, dtype=given.dtype)


if __name__ == "__main__":
    main()
