"""How many positions a model was made for, its stretched rotary embedding included."""

from collections.abc import Mapping
from typing import Any

_STRETCHED = ("yarn", "linear", "llama3", "longrope")
"""Types whose frequencies are fixed: those of "dynamic" change with every length"""


def context_length(config: Any) -> int | None:
    """Return the longest sequence that a configuration allows, None where it does not say.

    A factor of the rotary embedding stretches the positions that it was trained with, whether or
    not max_position_embeddings was raised as well, so the larger of both counts.

    Args:
        config: of a text model, transformers' or what config.json says.
    """
    stated = _whole_number(_value(config, "max_position_embeddings"))
    rope = _value(config, "rope_parameters") or _value(config, "rope_scaling")
    if not isinstance(rope, Mapping):
        return stated
    # Some models have one set of parameters for each kind of layer.
    sets = [each for each in rope.values() if isinstance(each, Mapping)] or [rope]
    stretched = [_stretched(each, config, stated) for each in sets]
    return max((each for each in (stated, *stretched) if each is not None), default=None)


def _stretched(rope: Mapping[str, Any], config: Any, stated: int | None) -> int | None:
    """Factor x original positions."""
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
