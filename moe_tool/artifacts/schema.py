"""The strict, frozen pydantic base of every JSON artifact and of what is nested in one."""

from pydantic import BaseModel, ConfigDict


class FrozenModel(BaseModel):
    """A value read from a hostile file: unknown keys, wrong types and non-finite numbers are
    refused."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)
