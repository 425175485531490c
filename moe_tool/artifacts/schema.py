"""Strict, frozen pydantic base of every JSON artifact and of its nested models."""

from pydantic import BaseModel, ConfigDict


class FrozenModel(BaseModel):
    """Model that refuses unknown keys, wrong types and non-finite numbers in hostile files."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)
