"""Supported settings of a model's generation_config.json; the rest is ignored."""

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import GenerationConfig

from moe_tool.errors import CorruptArtifactError
from moe_tool.formats.hostile_file import read_capped
from moe_tool.formats.strict_json import parse_json_object

_MAX_BYTES = 2**20
_REMEDY = (
    "fix or remove generation_config.json in the checkpoint's folder, and pack the bundle again"
)

Token = Annotated[int, Field(ge=0, lt=2**31)]


class _Settings(BaseModel):
    """Supported settings; other keys choose decoding methods that may need the model's own code."""

    model_config = ConfigDict(strict=True, extra="ignore")

    bos_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    no_repeat_ngram_size: Annotated[int, Field(ge=0)] | None = None
    suppress_tokens: list[Token] | None = None
    begin_suppress_tokens: list[Token] | None = None
    bad_words_ids: list[Annotated[list[Token], Field(min_length=1)]] | None = None


FOLLOWED_SETTINGS = tuple(
    name for name in _Settings.model_fields if name not in ("pad_token_id", "eos_token_id")
)
"""Settings passed to `generate`; padding and end-of-text tokens are set separately"""


def read_generation_settings(folder: Path) -> GenerationConfig | None:
    """Return the supported settings of generation_config.json; None without the file.

    Raises:
        CorruptArtifactError: it is not JSON, or a supported setting is invalid.
    """
    path = folder / "generation_config.json"
    if not os.path.lexists(path):
        return None
    raw = parse_json_object(
        path, read_capped(path, limit_bytes=_MAX_BYTES, remedy=_REMEDY), remedy=_REMEDY
    )
    try:
        settings = _Settings.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        name = str(first["loc"][0])
        raise CorruptArtifactError(
            f"{path} sets {name} to {str(raw[name])[:64]!r}: {first['msg']}", hint=_REMEDY
        ) from error
    found: dict[str, Any] = settings.model_dump(exclude_none=True)
    return GenerationConfig(**{name: value for name, value in found.items() if value != []})  # type: ignore[no-untyped-call]
