"""Formats of quantized checkpoints, and how each is recognised."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_tool.errors import UnsupportedModelError
from moe_tool.formats.hostile_file import one_line, read_capped
from moe_tool.formats.safetensors_index import Checkpoint, TensorInfo
from moe_tool.formats.strict_json import parse_json_object
from moe_tool.models.stored_formats import (
    awq,
    bitsandbytes,
    compressed_tensors,
    fp8,
    gptq,
    mlx,
    modelopt,
    mxfp4,
)
from moe_tool.models.stored_formats.gguf import holds_gguf, open_gguf
from moe_tool.models.stored_formats.logical_checkpoint import LogicalCheckpoint
from moe_tool.models.stored_formats.stored_tensor import StoredTensor

SETTING_KEYS = frozenset({"quantization_config", "compression_config", "quantization"})
"""Keys of config.json that tell of quantized weights"""
_NESTED = ("text_config", "thinker_config", "language_config", "llm_config")
_METHOD = "quant_method"
_MAX_FILE_BYTES = 16 * 2**20
_AGAIN = "download the checkpoint again"
_FILES = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq"}
"""Format by the file that tells of it, if config.json does not"""
_UNUSED = re.compile(
    r"\.(weight_shape|(q|k|v|kv|prob|output)_scale|input_(scale|zero_point|global_scale|g_idx)|"
    r"(\w+_)?activation_scale(_inv)?)$"
)
"""Scales of activations and of the cache, which are not quantized here, and shapes"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFormat:
    """One format that can be read."""

    methods: frozenset[str]
    """Values of quant_method"""
    stored_tensors: Callable[
        [Mapping[str, TensorInfo], Mapping[str, Any]], Mapping[str, StoredTensor]
    ]
    """Headers and settings -> logical tensors; refuses what does not fit"""
    reads_shapes: bool = False
    """Whether shapes of weights lie in tensors, which are then read, and not in headers"""


FORMATS = (
    StoredFormat(methods=frozenset({"fp8"}), stored_tensors=fp8.stored_tensors),
    StoredFormat(methods=frozenset({"mxfp4"}), stored_tensors=mxfp4.stored_tensors),
    StoredFormat(
        methods=frozenset({"compressed-tensors"}), stored_tensors=compressed_tensors.stored_tensors
    ),
    StoredFormat(
        methods=frozenset({"modelopt", "modelopt_fp4"}), stored_tensors=modelopt.stored_tensors
    ),
    StoredFormat(methods=frozenset({"awq"}), stored_tensors=awq.stored_tensors),
    StoredFormat(
        methods=frozenset({"bitsandbytes"}),
        stored_tensors=bitsandbytes.stored_tensors,
        reads_shapes=True,
    ),
    StoredFormat(methods=frozenset({"mlx"}), stored_tensors=mlx.stored_tensors),
    StoredFormat(methods=frozenset({"gptq"}), stored_tensors=gptq.stored_tensors),
)


def declared_settings(folder: Path | None, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return how a checkpoint says that its weights are quantized; None: it does not.

    Args:
        folder: its folder; None: only `config` is looked at.
        config: content of config.json.

    Raises:
        CorruptArtifactError: a file that tells of it is damaged.
    """
    if folder is not None and holds_gguf(folder):
        return None  # config.json is that of the checkpoint that the file was made from
    nested = [config.get(key) for key in _NESTED]
    for holder in (config, *(each for each in nested if isinstance(each, dict))):
        for key in sorted(SETTING_KEYS):
            found = holder.get(key)
            if found is not None:
                settings = dict(found) if isinstance(found, dict) else {}
                method = "mlx" if key == "quantization" else "unknown"
                return {_METHOD: method, **settings}
    for name, method in _FILES.items():
        if folder is not None and (folder / name).is_file():
            raw = parse_json_object(
                folder / name,
                read_capped(folder / name, limit_bytes=_MAX_FILE_BYTES, remedy=_AGAIN),
                remedy=_AGAIN,
            )
            inner = raw.get("quantization") if method == "modelopt" else raw
            return {**(inner if isinstance(inner, dict) else {}), _METHOD: method}
    return None


def find_format(settings: Mapping[str, Any], model_type: str) -> StoredFormat:
    """Return the format that settings name.

    Raises:
        UnsupportedModelError: it is not read.
    """
    method = str(settings[_METHOD]).lower()
    for each in FORMATS:
        if method in each.methods:
            return each
    raise UnsupportedModelError(
        f"this {one_line(model_type[:64])} checkpoint is stored in {one_line(method[:32])} format, "
        "which is not read",
        hint="use a version of the checkpoint in float32, bfloat16 or float16, or in one of the "
        f"formats {', '.join(sorted(method for each in FORMATS for method in each.methods))}, gguf",
    )


def open_checkpoint(folder: Path, config: Mapping[str, Any]) -> Checkpoint:
    """Open a checkpoint; a quantized one reads like the float32 one that it stands for.

    Args:
        folder: the checkpoint.
        config: content of its config.json.

    Raises:
        NotFoundError, CorruptArtifactError, UnsupportedModelError: as `Checkpoint.open_folder`,
            `find_format` and the format, or `open_gguf`.
    """
    if holds_gguf(folder):
        return open_gguf(folder, config)
    settings = declared_settings(folder, config)
    if settings is not None:
        find_format(settings, str(config.get("model_type")))  # before the tensors are looked for
    return read_as_declared(Checkpoint.open_folder(folder), folder, config)


def headers_tell_all(folder: Path, config: Mapping[str, Any]) -> bool:
    """Return whether headers alone tell the shapes of a checkpoint's weights.

    Raises:
        CorruptArtifactError, UnsupportedModelError: as `declared_settings` and `find_format`.
    """
    settings = declared_settings(folder, config)
    return settings is None or not find_format(settings, str(config.get("model_type"))).reads_shapes


def read_as_declared(
    raw: Checkpoint,
    folder: Path,
    config: Mapping[str, Any],
    *,
    apart: Collection[str] = (),
) -> Checkpoint:
    """Return tensors on disk as those that they stand for; themselves if none is quantized.

    Args:
        raw: an open checkpoint, or a part of one; its `on_read` stays.
        folder: holds config.json, and other files that tell how weights are quantized.
        config: content of config.json.
        apart: tensors that are no part of the checkpoint's format.

    Raises:
        CorruptArtifactError, UnsupportedModelError: as `find_format` and the format.
    """
    settings = declared_settings(folder, config)
    if settings is None:
        return raw
    found = find_format(settings, str(config.get("model_type")))
    tensors = {name: info for name, info in raw.tensors.items() if name not in apart}
    stored = found.stored_tensors(tensors, settings)
    parts = {name for tensor in stored.values() for name in tensor.parts.values()}
    unused = [name for name in raw.tensors if name not in parts and _UNUSED.search(name)]
    return LogicalCheckpoint(
        raw,
        stored,
        format_name=str(settings[_METHOD]).lower(),
        unused=unused,
        is_declared=True,
    )
