"""JSON objects from hostile files: no key twice, no NaN, no infinity, no bottomless nesting."""

import json
from pathlib import Path
from typing import Any

from moe_tool.errors import CorruptArtifactError


def parse_json_object(path: Path, text: bytes, *, remedy: str) -> dict[str, Any]:
    """Parse the JSON object that a file holds.

    Args:
        path: named in errors.
        text: the file's bytes.
        remedy: the hint of the error.

    Raises:
        CorruptArtifactError: it is anything else than one JSON object.
    """
    try:
        parsed = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise CorruptArtifactError(f"{path} is damaged: {reason}", hint=remedy) from error
    if not isinstance(parsed, dict):
        raise CorruptArtifactError(f"{path} is damaged: its JSON is not an object", hint=remedy)
    return parsed


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key[:200]!r} occurs twice")
        result[key] = value
    return result


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
