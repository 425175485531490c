"""GGUF: one file in blocks of llama.cpp's types, with config.json and tokenizer of the model beside
it."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moe_tool.errors import UnsupportedModelError
from moe_tool.formats.gguf_header import BLOCKS, GgufTensor, read_gguf
from moe_tool.formats.hostile_file import quoted
from moe_tool.formats.safetensors_index import Checkpoint, TensorInfo
from moe_tool.models.stored_formats.gguf_codes import GgufForm, common_form, kept_weight
from moe_tool.models.stored_formats.logical_checkpoint import LogicalCheckpoint
from moe_tool.models.stored_formats.stored_tensor import (
    Parts,
    StoredTensor,
    refused,
    require_part,
)
from moe_tool.quantization.kept_codes import KeptWeight

_FLOATS = frozenset({"F32", "F16", "BF16"})
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_CHUNK = 2**18
"""Weights decoded at a time"""
_CHUNK_BYTES = 16
"""Bytes that the gguf library holds for each of them"""
_BLOCK_SIZES = {name: (n_weights, n_bytes) for name, n_weights, n_bytes in BLOCKS.values()}
_NAME = re.compile(r"blk\.(\d{1,5})\.(\w+)(\.weight|\.bias)")
_EXPERTS = re.compile(r"ffn_(gate|up|down)_exps")
_HEADS = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
"""Key of config.json with the heads that a matrix's rows belong to"""
_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """Names of one architecture, and what llama.cpp's converter changes in its weights."""

    architecture: str
    modules: Mapping[str, str]
    """Module of a layer by its name in a block"""
    experts: Mapping[str, str]
    """Matrices of one expert; empty: gpt-oss's, with gate and up in turns"""
    is_permuted: bool = False
    """Whether rows of queries and keys lie as rotary embeddings of pairs want them"""


_MODELS = {
    "qwen3_moe": _Model(
        architecture="qwen3moe",
        modules=_BLOCK
        | {
            "attn_q_norm": "self_attn.q_norm",
            "attn_k_norm": "self_attn.k_norm",
            "ffn_norm": "post_attention_layernorm",
            "ffn_gate_inp": "mlp.gate",
        },
        experts={part: f"mlp.experts.{{}}.{part}_proj" for part in ("gate", "up", "down")},
    ),
    "mixtral": _Model(
        architecture="llama",
        modules=_BLOCK
        | {"ffn_norm": "post_attention_layernorm", "ffn_gate_inp": "block_sparse_moe.gate"},
        experts={
            part: f"block_sparse_moe.experts.{{}}.{name}"
            for part, name in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
        },
        is_permuted=True,
    ),
    "gpt_oss": _Model(
        architecture="gpt-oss",
        modules=_BLOCK
        | {"post_attention_norm": "post_attention_layernorm", "ffn_gate_inp": "mlp.router"},
        experts={},
    ),
}


def holds_gguf(folder: Path) -> bool:
    """Return whether a folder's weights lie in GGUF files; safetensors go before them."""
    return bool(_files(folder)) and not any((folder / name).exists() for name in _SAFETENSORS)


def open_gguf(folder: Path, config: Mapping[str, Any]) -> Checkpoint:
    """Open the GGUF file of a folder; it reads like the float32 checkpoint that it stands for.

    Raises:
        UnsupportedModelError: the folder holds several, or an architecture that is not read.
        CorruptArtifactError: the file is damaged, or not that of config.json.
        StorageError: it cannot be read.
    """
    path, *others = _files(folder)
    header = read_gguf(path)
    n_parts = header.metadata.get("split.count")
    if others or n_parts not in (None, 0, 1):
        raise UnsupportedModelError(
            f"{folder} holds its weights in several GGUF files, one of them {path.name}",
            hint="leave one; parts are merged with llama.cpp's llama-gguf-split --merge "
            "FIRST_PART WHOLE",
        )
    model_type, found = config.get("model_type"), header.metadata.get("general.architecture")
    model = _MODELS.get(str(model_type))
    if model is None or found != model.architecture:
        read = ", ".join(f"{each.architecture} ({key})" for key, each in _MODELS.items())
        raise UnsupportedModelError(
            f"{path} is GGUF of architecture {quoted(found)} beside a config.json of "
            f"{quoted(model_type)}, which is not read",
            hint=f"architectures that are read, with their model_type: {read}; of others, give "
            "the folder of the checkpoint in safetensors that it was made from",
        )
    kinds = {tensor.name: tensor.kind for tensor in header.tensors}
    raw = {tensor.name: _raw_info(path, tensor) for tensor in header.tensors}
    form = common_form({kind for name, kind in kinds.items() if _holds_expert_matrices(name)})
    stored: dict[str, StoredTensor] = {}
    for name in raw:
        stored.update(_logical(raw, kinds, name, model, config, form))
    checkpoint = Checkpoint(raw)
    checkpoint.requires_finite = True
    return LogicalCheckpoint(checkpoint, stored, format_name="gguf")


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.gguf"))


def _holds_expert_matrices(name: str) -> bool:
    match = _NAME.fullmatch(name)
    return match is not None and match[3] == ".weight" and bool(_EXPERTS.fullmatch(match[2]))


def _raw_info(path: Path, tensor: GgufTensor) -> TensorInfo:
    """Return a header as of floats, or of bytes of blocks."""
    n_weights, n_bytes = _BLOCK_SIZES[tensor.kind]
    return TensorInfo(
        name=tensor.name,
        dtype=tensor.kind if tensor.kind in _FLOATS else "U8",
        shape=tensor.shape
        if tensor.kind in _FLOATS
        else (*tensor.shape[:-1], tensor.shape[-1] // n_weights * n_bytes),
        file=path,
        offset=tensor.offset,
        size_bytes=tensor.size_bytes,
    )


def _logical(
    raw: Mapping[str, TensorInfo],
    kinds: Mapping[str, str],
    name: str,
    model: _Model,
    config: Mapping[str, Any],
    form: GgufForm | None,
) -> Iterator[tuple[str, StoredTensor]]:
    """Yield what a tensor stands for in transformers' names; experts' codes are kept in `form`."""
    info, match = raw[name], _NAME.fullmatch(name)
    if name in _OUTER:
        yield _OUTER[name], _matrix(info, kinds[name])
        return
    layer, module, ending = match.groups() if match else ("", "", "")
    before = f"model.layers.{layer}."
    if module in model.modules:
        heads = config.get(_HEADS[module]) if model.is_permuted and module in _HEADS else None
        yield f"{before}{model.modules[module]}{ending}", _matrix(info, kinds[name], heads=heads)
    elif module == "attn_sinks" and not model.experts:
        yield f"{before}self_attn.sinks", _matrix(info, kinds[name])
    elif (part := _EXPERTS.fullmatch(module)) is None or len(info.shape) != 3 - (ending == ".bias"):
        raise refused(info, f"is no part of a model of architecture {model.architecture}")
    elif model.experts:
        for expert in range(info.shape[0]):
            called = model.experts[part[1]].format(expert)
            yield f"{before}{called}{ending}", _matrix(info, kinds[name], row=expert, form=form)
    else:
        called = "down_proj" if part[1] == "down" else "gate_up_proj"
        names = [name]
        if part[1] != "down":
            names = [f"blk.{layer}.ffn_{each}_exps{ending}" for each in ("gate", "up")]
        parts = [require_part(raw, each, of=name) for each in names]
        suffix = "_bias" if ending == ".bias" else ""
        stack = _stack(parts, [kinds[n] for n in names], form)
        yield f"{before}mlp.experts.{called}{suffix}", stack


def _matrix(
    info: TensorInfo,
    kind: str,
    *,
    row: int | None = None,
    heads: object = None,
    form: GgufForm | None = None,
) -> StoredTensor:
    """Return a tensor, or a row of a stack, as it lies; with rows put back if there are heads."""
    shape = _shape(info, kind)[0 if row is None else 1 :]
    if heads is not None and (type(heads) is not int or heads < 1 or shape[0] % (2 * heads)):
        raise refused(info, f"has {shape[0]} rows for {str(heads)[:32]} heads")

    def decode(parts: Parts) -> torch.Tensor:
        values = _floats(parts["codes"], kind)
        if type(heads) is not int:
            return values
        pairs = values.view(heads, shape[0] // heads // 2, 2, -1)
        return pairs.transpose(1, 2).reshape(shape)

    n_weights = math.prod(shape)
    return StoredTensor(
        parts={"codes": info.name},
        shape=shape,
        decode=decode,
        keep=(lambda parts: kept_weight(parts["codes"], kind, form))
        if form is not None and len(shape) == 2
        else None,
        row=row,
        decode_bytes=_decode_bytes(info, kind, shape) + (4 * n_weights if heads else 0),
    )


def _stack(infos: list[TensorInfo], kinds: list[str], form: GgufForm | None) -> StoredTensor:
    """Return all experts' [E, in, out] or biases [E, out], of gate and up in turns if of both."""
    first = _shape(infos[0], kinds[0])
    for info, kind in zip(infos, kinds, strict=True):
        if _shape(info, kind) != first:
            raise refused(info, f"has shape {list(_shape(info, kind))}, wanted {list(first)}")
    shape = (first[0], first[1] * len(infos), *first[2:])

    def decode(parts: Parts) -> torch.Tensor:
        made = [_floats(parts[str(k)], kind) for k, kind in enumerate(kinds)]
        joined = made[0] if len(made) == 1 else torch.stack(made, dim=1).flatten(0, 1)
        return joined.T if joined.ndim == 2 else joined

    def keep(parts: Parts) -> KeptWeight:
        assert form is not None
        made = [kept_weight(parts[str(k)], kind, form) for k, kind in enumerate(kinds)]

        def in_turns(name: str) -> torch.Tensor:
            return torch.stack([weight.part(name) for weight in made], dim=1).flatten(0, 1)

        return replace(
            made[0],
            codes=in_turns("codes"),
            scale=in_turns("scale"),
            zero=None if made[0].zero is None else in_turns("zero"),
        )

    each = sum(_decode_bytes(i, kind, first[1:]) for i, kind in zip(infos, kinds, strict=True))
    return StoredTensor(
        parts={str(k): info.name for k, info in enumerate(infos)},
        shape=(shape[0], *reversed(shape[1:])),
        decode=decode,
        keep=keep if form is not None and len(first) == 3 else None,
        decode_bytes=each + (4 * math.prod(shape[1:]) if len(infos) > 1 else 0),
        is_stacked=True,
    )


def _shape(info: TensorInfo, kind: str) -> tuple[int, ...]:
    n_weights, n_bytes = (1, 1) if kind in _FLOATS else _BLOCK_SIZES[kind]
    return (*info.shape[:-1], info.shape[-1] // n_bytes * n_weights)


def _decode_bytes(info: TensorInfo, kind: str, shape: tuple[int, ...]) -> int:
    """Return the bytes that `_floats` holds for a tensor, or for a row, of a shape."""
    n_weights = math.prod(shape)
    n_rows = math.prod(_shape(info, kind)) // n_weights
    chunk = 0 if kind in _FLOATS else _CHUNK_BYTES * min(n_weights, max(_CHUNK, shape[-1]))
    return info.size_bytes // n_rows + 4 * n_weights + chunk


def _floats(read: torch.Tensor, kind: str) -> torch.Tensor:
    """Return float32 of floats, or of blocks [..., bytes], decoded some rows at a time."""
    if kind in _FLOATS:
        return read.to(torch.float32)
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    n_weights, n_bytes = _BLOCK_SIZES[kind]
    rows = read.view(-1, read.shape[-1])
    made = torch.empty(rows.shape[0], rows.shape[1] // n_bytes * n_weights)
    step = max(1, _CHUNK // made.shape[1])
    for start in range(0, len(rows), step):
        part = dequantize(rows[start : start + step].numpy(), GGMLQuantizationType[kind])
        made[start : start + step] = torch.from_numpy(part)
    return made.view(*read.shape[:-1], -1)
