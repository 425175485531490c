"""Strict parser of JSON objects from hostile files: UTF-8, no duplicate keys, no NaN, no deep
nesting."""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moe_tool.errors import CorruptArtifactError
from moe_tool.formats.foreign_files import BEGINNING_BYTES, foreign_content
from moe_tool.formats.hostile_file import one_line, quoted

_MAX_DIGITS = 40


def parse_json_object(path: Path, text: bytes, *, remedy: str) -> dict[str, Any]:
    """Parse the JSON object that a file holds.

    Raises:
        CorruptArtifactError: it is anything else than one JSON object.
        UnsupportedModelError: it is a GGUF file.
    """
    if (foreign := foreign_content(path, text[:BEGINNING_BYTES])) is not None:
        raise foreign
    try:
        parsed = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_int=_bounded_integer,
            parse_constant=_refuse_constant,
        )
    except (RecursionError, MemoryError) as error:
        raise CorruptArtifactError(f"{path} is damaged: nested too deeply", hint=remedy) from error
    except UnicodeError as error:
        raise CorruptArtifactError(f"{path} is damaged: not text in UTF-8", hint=remedy) from error
    except ValueError as error:
        raise CorruptArtifactError(f"{path} is damaged: {one_line(error)}", hint=remedy) from error
    if not isinstance(parsed, dict):
        raise CorruptArtifactError(f"{path} is damaged: its JSON is not an object", hint=remedy)
    return parsed


def first_complaint(error: ValidationError) -> str:
    """Return the place and reason of the first validation error on one line."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(ascii(step).strip("'\"") for step in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return one_line(f"{where}: {message}" if where else message)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {quoted(key)} occurs twice")
        key.encode("utf-8")  # an escaped lone surrogate is no text
        result[key] = value
    return result


def _bounded_integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
