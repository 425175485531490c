"""Context length of a model, scaled rotary embeddings included."""

from collections.abc import Mapping
from typing import Any

_STRETCHED = ("yarn", "linear", "llama3", "longrope")
"""Rope types with fixed frequencies; those of "dynamic" change with the length"""


def context_length(config: Any) -> int | None:
    """Return the context length that a configuration allows; None if unknown.

    A rope factor extends the original context whether or not max_position_embeddings was raised
    too, so the larger of both is returned.

    Args:
        config: a text model's configuration, of transformers or as a mapping from config.json.
    """
    stated = _whole_number(_value(config, "max_position_embeddings"))
    rope = _value(config, "rope_parameters") or _value(config, "rope_scaling")
    if not isinstance(rope, Mapping):
        return stated
    # Some models have one set of rope parameters per type of layer.
    sets = [each for each in rope.values() if isinstance(each, Mapping)] or [rope]
    stretched = [_stretched(each, config, stated) for each in sets]
    return max((each for each in (stated, *stretched) if each is not None), default=None)


def _stretched(rope: Mapping[str, Any], config: Any, stated: int | None) -> int | None:
    """Return factor x original positions; None without such a factor."""
    kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor")
    if kind not in _STRETCHED or not isinstance(factor, int | float) or not 1 < factor < 2**20:
        return None
    name = "original_max_position_embeddings"
    original = _whole_number(rope.get(name)) or _whole_number(_value(config, name)) or stated
    return None if original is None else int(factor * original)


def _value(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _whole_number(value: Any) -> int | None:
    return value if type(value) is int and 0 < value < 2**31 else None
