"""Parameters of policies: bounds, defaults, reading and writing."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_tool.errors import UsageError

_WHOLE = re.compile(r"-?[0-9]{1,9}")
"""Whole number of nine digits at most: int() raises on thousands"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """Description of one numeric parameter."""

    help: str
    """Meaning and unit, for --help and docs"""
    default: float
    least: float = 0
    most: float = 1
    is_whole: bool = False

    @property
    def bounds(self) -> str:
        """Allowed values in words."""
        kind = "whole, " if self.is_whole else ""
        return f"{kind}{number_text(self.least)} to {number_text(self.most)}"


def whole_number(help: str, *, default: int, least: int = 1, most: int = 10**6) -> Parameter:
    """Return the description of a parameter whose values are whole."""
    return Parameter(help=help, default=default, least=least, most=most, is_whole=True)


def read_values(
    place: str,
    words: Sequence[str],
    parameters: Mapping[str, Parameter],
    *,
    others: Sequence[str] = (),
) -> dict[str, float]:
    """Return the value of every parameter, from words like "alpha=0.3" or by default.

    Args:
        place: option and text that the words come from, for a refusal.
        words, parameters: texts between commas, and known parameters by name.
        others: whole texts that may be given instead, for a refusal.

    Raises:
        UsageError: a parameter is unknown, or it cannot have this value.
    """
    values = {name: each.default for name, each in parameters.items()}
    return values | dict(_read_word(place, word, parameters, others) for word in words)


def _read_word(
    place: str, word: str, parameters: Mapping[str, Parameter], others: Sequence[str]
) -> tuple[str, float]:
    name, _, text = word.partition("=")
    if name not in parameters:
        named = [f"{each}={number_text(p.default)}" for each, p in parameters.items()]
        known = f"it takes {', '.join(named)}" if named else "it takes no parameter"
        sets = f"; or one of the sets of values {', '.join(others)}" if others else ""
        raise UsageError(f"{place}: {word!r} is not known", hint=known + sets)
    allowed = parameters[name]
    value = _read_number(text, allowed)
    if not allowed.least <= value <= allowed.most:
        kind = "a whole number" if allowed.is_whole else "a number"
        raise UsageError(
            f"{place}: {word!r} is out of range",
            hint=f"{kind} from {number_text(allowed.least)} to {number_text(allowed.most)} is "
            "possible",
        )
    return name, value


def changed_words(
    values: Mapping[str, float], parameters: Mapping[str, Parameter]
) -> tuple[str, ...]:
    """Return "name=value" for every value that differs from its default."""
    return tuple(
        f"{name}={number_text(value)}"
        for name, value in values.items()
        if value != parameters[name].default
    )


def number_text(value: float) -> str:
    """Return the shortest text that is read as the same number."""
    if isinstance(value, int):
        return str(value)
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _read_number(text: str, allowed: Parameter) -> float:
    """Return the number in a text; NaN, which is in no range, if it is none."""
    if allowed.is_whole:
        return int(text) if _WHOLE.fullmatch(text) else math.nan
    try:
        return float(text)
    except ValueError:
        return math.nan
