"""Conversion of results to the JSON of `--json`: fields and properties, one key per number."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any


class Spread:
    """Base of groups whose keys are merged into those of the result that contains them."""

    __slots__ = ()

    def keys_of(self, _name: str, /) -> dict[str, Any]:
        """Return the group's keys; a subclass may derive them from the field's name."""
        return object_fields(self)


def json_fields(value: Any) -> Any:
    """Return a value in JSON's types: results as objects, arrays as lists, paths as strings,
    non-finite numbers as null."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Mapping):
        return {str(key): json_fields(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [json_fields(each) for each in value]
    dump = getattr(value, "model_dump", None)  # pydantic, whose import would slow down --help
    if callable(dump):
        return json_fields(dump(mode="json"))
    if is_dataclass(value):
        return object_fields(value)
    as_list = getattr(value, "tolist", None)  # numpy's arrays and scalars
    return json_fields(as_list()) if callable(as_list) else str(value)


def object_fields(result: Any) -> dict[str, Any]:
    """Return the fields of a dataclass, then its properties, with `Spread` groups merged."""
    names = [field.name for field in fields(result)]
    names += [name for name, member in vars(type(result)).items() if isinstance(member, property)]
    found: dict[str, Any] = {}
    for name in names:
        value = getattr(result, name)
        keys = value.keys_of(name) if isinstance(value, Spread) else {name: value}
        found |= json_fields(keys)
    return found
