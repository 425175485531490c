"""Spellings of config.json that are brought to one form before a configuration is made."""

import math
from typing import Any

_FLOAT_TAG = "__float__"
_TAGGED_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
_OTHER_NAMES = {"kimi_k2": "deepseek_v3"}
"""Model type -> the type of transformers with the same modules and tensors"""
_LANGUAGE_PARTS = {"qwen3_omni_moe": ("thinker_config", "qwen3_omni_moe_thinker")}
"""Model type -> key and model type of the only part that predicts tokens of text"""
TENSOR_PREFIXES = {"qwen3_omni_moe_thinker": "thinker."}
"""Model type of such a part -> prefix of its tensors in a checkpoint of the whole"""


def plain_config(raw: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration from JSON with plain floats and the names that transformers knows."""
    config: dict[str, Any] = _decoded(raw)
    key, part_type = _LANGUAGE_PARTS.get(str(config.get("model_type")), ("", ""))
    if isinstance(config.get(key), dict):
        config = {**config[key], "model_type": part_type}
    return config


def encode_floats(value: Any) -> Any:
    """Return a value from JSON with floats that JSON lacks spelt as transformers does."""
    if isinstance(value, float) and not math.isfinite(value):
        name = "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        return {_FLOAT_TAG: name}
    if isinstance(value, dict):
        return {key: encode_floats(each) for key, each in value.items()}
    return [encode_floats(each) for each in value] if isinstance(value, list) else value


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(each) for each in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_FLOAT_TAG}:
        return _TAGGED_FLOATS.get(str(value[_FLOAT_TAG]), value)
    found = {key: _decoded(each) for key, each in value.items()}
    if isinstance(found.get("model_type"), str):
        found["model_type"] = _OTHER_NAMES.get(found["model_type"], found["model_type"])
    return found
