"""Configuration of a model, from config.json or from a copy of it in an artifact."""

import json
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from moe_tool.errors import CorruptArtifactError, NotFoundError
from moe_tool.formats.foreign_files import BEGINNING_BYTES, foreign_content, foreign_folder
from moe_tool.formats.hostile_file import one_line
from moe_tool.formats.strict_json import parse_json_object
from moe_tool.models.config_dialects import encode_floats, plain_config
from moe_tool.models.moe_layers import unsupported
from moe_tool.models.mole.config import MODEL_TYPE as MOLE
from moe_tool.models.stored_formats.registry import SETTING_KEYS, declared_settings, find_format

_MAX_CONFIG_BYTES = 4 * 2**20
# Twenty times more than any model has; building modules for a damaged number would take hours.
_MAX_LAYERS = 4096
_COUNTS = (
    "max_position_embeddings",
    "sliding_window",
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "num_experts_per_tok",
    "num_local_experts",
    "expert_intermediate_size",
)
_TEXT_MODELS = frozenset(
    (
        *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        MOLE,
    )
)
_NEVER_USED = frozenset(
    (
        # code, which is never run, and labels, which language models do not use
        *("auto_map", "num_labels", "id2label", "label2id", "problem_type"),
        # outputs of a call, which every call here chooses itself
        *("return_dict", "use_return_dict", "use_cache", "torchscript"),
        *("output_attentions", "output_hidden_states", "output_router_logits"),
        # kernels and training settings of the machine that saved the model
        *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
        *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
        *("_attn_implementation_autoset", "_flash_attn_2_enabled", "gradient_checkpointing"),
        # the form of the weights on the disk, which `open_checkpoint` reads
        *SETTING_KEYS,
    )
)
"""Keys without influence on what the model computes"""
_HINT = "download the checkpoint again"
_RECORD_AGAIN = "record the profile again with moe-tool profile"


def read_config(folder: Path) -> PreTrainedConfig:
    """Read config.json of a model that predicts text, without executing code that it names.

    Raises:
        NotFoundError: the folder has no config.json.
        CorruptArtifactError: it is not a model's configuration.
        UnsupportedModelError: transformers has no model of this type that predicts text, or the
            weights are quantized in a format that is not read.
    """
    path = folder / "config.json"
    raw = read_raw_config(folder)
    _require_format(raw, folder)
    return _config_of(path, raw, _HINT)


def read_raw_config(folder: Path) -> dict[str, Any]:
    """Return the content of config.json.

    Raises:
        NotFoundError: the folder has no config.json.
        CorruptArtifactError: it is no JSON object.
    """
    return _read_json(folder / "config.json")


def read_config_text(folder: Path) -> str:
    """Return config.json as one line, for `config_from_json`, without keys that are never used.

    Raises:
        NotFoundError, CorruptArtifactError: as `read_config`.
    """
    raw = encode_floats(_without_leftovers(read_raw_config(folder)))
    return json.dumps(raw, separators=(",", ":"), allow_nan=False)


def config_from_json(text: str, source: Path = Path("config.json")) -> PreTrainedConfig:
    """Return `read_config(folder).get_text_config()` from the text of `read_config_text(folder)`.

    Args:
        text: JSON from an artifact, which may be hostile; code that it names is never executed.
        source: the artifact, named in errors.

    Raises:
        CorruptArtifactError, UnsupportedModelError: as `read_config`.
    """
    raw = parse_json_object(source, text.encode(errors="replace"), remedy=_RECORD_AGAIN)
    config = _config_of(source, raw, _RECORD_AGAIN)
    try:
        text_config: PreTrainedConfig = config.get_text_config()
    except Exception as error:  # damaged parts raise anything
        raise bad_config(source, error, _RECORD_AGAIN) from error
    return text_config


def bad_config(path: Path, error: Exception, hint: str = _HINT) -> CorruptArtifactError:
    """Return the error for a configuration that transformers cannot use."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = one_line(" ".join(lines[:2])) or type(error).__name__
    return CorruptArtifactError(f"{path} does not describe a model: {reason}", hint=hint)


def _config_of(path: Path, raw: dict[str, Any], hint: str) -> PreTrainedConfig:
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise CorruptArtifactError(
            f"{path} names no model_type",
            hint="use the folder of a checkpoint in Hugging Face format",
        )
    raw = plain_config(raw)
    model_type = str(raw["model_type"])[:64]
    if model_type not in CONFIG_MAPPING:
        reason = "transformers does not know it"
        if "auto_map" in raw:
            reason = "it needs Python code of its own, which is never executed"
        raise unsupported(model_type, reason)
    if model_type not in _TEXT_MODELS:
        raise unsupported(model_type, "it is not a model that predicts text token by token")
    _require_format(raw, None)
    text = raw.get("text_config")
    for part in (raw, text) if isinstance(text, dict) else (raw,):
        _require_counts(path, part, hint)
    try:
        return CONFIG_MAPPING[model_type].from_dict(_without_leftovers(raw))
    except Exception as error:  # each configuration class has errors of its own
        raise bad_config(path, error, hint) from error


def _without_leftovers(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration, nested ones included, without keys that are never used."""
    return {
        key: _without_leftovers(value) if isinstance(value, dict) else value
        for key, value in raw.items()
        if key not in _NEVER_USED
    }


def _read_json(path: Path) -> dict[str, Any]:
    hint = "use the folder of a checkpoint in Hugging Face format"
    if not path.is_file():
        raise foreign_folder(path.parent) or NotFoundError(
            f"{path.parent} has no config.json", hint=hint
        )
    size_bytes = path.stat().st_size
    if size_bytes > _MAX_CONFIG_BYTES:
        raise CorruptArtifactError(
            f"{path} has {size_bytes} bytes, wanted at most {_MAX_CONFIG_BYTES}", hint=hint
        )
    data = path.read_bytes()
    foreign = foreign_content(path, data[:BEGINNING_BYTES])
    if foreign is not None:
        raise foreign
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptArtifactError(f"{path} is not JSON: {error}", hint=hint) from error
    if not isinstance(raw, dict):
        raise CorruptArtifactError(f"{path} is not a JSON object", hint=hint)
    return raw


def _require_counts(path: Path, raw: dict[str, Any], hint: str) -> None:
    """Refuse impossible sizes before modules or masks are built from them."""
    n_layers = raw.get("num_hidden_layers")
    n_layers = 1 if n_layers is None else n_layers
    if not isinstance(n_layers, int) or not 1 <= n_layers <= _MAX_LAYERS:
        raise CorruptArtifactError(
            f"{path}: num_hidden_layers is {str(n_layers)[:32]}, wanted 1 to {_MAX_LAYERS}",
            hint=hint,
        )
    for key in _COUNTS:
        value = raw.get(key)
        is_unused = key == "sliding_window" and raw.get("use_sliding_window") is False
        if value is None or is_unused:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
            raise CorruptArtifactError(
                f"{path}: {key} is {one_line(str(value)[:32])}, wanted a whole number from 1 on",
                hint=hint,
            )


def _require_format(raw: dict[str, Any], folder: Path | None) -> None:
    settings = declared_settings(folder, raw)
    if settings is not None:
        find_format(settings, str(raw.get("model_type")))
