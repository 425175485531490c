"""End-of-text tokens from the three places that may name them, and the reason why a text ended."""

import json
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_tool.artifacts.run_result import StopReason
from moe_tool.models.model_config import read_config_text


@dataclass(frozen=True, slots=True, kw_only=True)
class EndTokens:
    """The end-of-text tokens of a model."""

    ids: tuple[int, ...]
    """Token ids, ascending; empty if no place names one"""
    note: str | None
    """Sentence about tokens that the generation settings lack; None if they lack none"""


def find_end_tokens(
    folder: Path, *, generation_config: Any, tokenizer: Any, vocabulary: int
) -> EndTokens:
    """Join the end-of-text tokens of generation settings, config.json and tokenizer.

    transformers follows the generation settings alone: a chat model whose settings lack the end of
    a turn then continues to the last token.

    Args:
        folder: folder of config.json.
        generation_config: the model's generation_config.json, or its values in config.json.
        tokenizer: tokenizer of transformers.
        vocabulary: V; other ids are ignored.

    Raises:
        NotFoundError, CorruptArtifactError: config.json cannot be read.
    """
    # Configuration classes have default end tokens, so the file itself is read.
    stated = json.loads(read_config_text(folder))
    of_text = stated.get("text_config")
    places = {
        "config.json": [
            *_ids(stated.get("eos_token_id")),
            *_ids(of_text.get("eos_token_id") if isinstance(of_text, dict) else None),
        ],
        "the tokenizer": _ids(getattr(tokenizer, "eos_token_id", None)),
    }
    found = {token: "" for token in _ids(generation_config.eos_token_id)}
    for place, ids in places.items():
        for token in ids:
            found.setdefault(token, place)
    found = {token: place for token, place in found.items() if token < vocabulary}
    added = [
        f"{tokenizer.convert_ids_to_tokens(token)} ({token}), as {place} says"
        for token, place in found.items()
        if place
    ]
    note = None
    if added and len(added) < len(found):
        note = f"text ends also at {' and '.join(added)}: the generation settings lack it"
    return EndTokens(ids=tuple(sorted(found)), note=note)


def until_end(row: Sequence[int], stops: Set[int]) -> tuple[int, ...]:
    """Return a row without the padding that follows its end-of-text token."""
    for position, token in enumerate(row):
        if token in stops:
            return tuple(row[: position + 1])
    return tuple(row)


def stop_reason(
    row: Sequence[int], stops: Set[int], *, room: int, max_tokens: int, interrupted: bool
) -> StopReason:
    """Return why a text of `until_end` ended that the context had `room` for."""
    if row and row[-1] in stops:
        return "end_of_text"
    if interrupted:
        return "interrupted"
    return "context" if room < max_tokens else "max_tokens"


def _ids(value: object) -> Sequence[int]:
    listed = value if isinstance(value, list | tuple) else [value]
    return [each for each in listed if type(each) is int and each >= 0]
