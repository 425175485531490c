"""The eviction policy that a file names: one that there is, with parameters that it can have."""

from typing import Annotated

from pydantic import AfterValidator, Field

from moe_tool.errors import UsageError
from moe_tool.policies.eviction import parse_eviction


def _known(name: str) -> str:
    try:
        parse_eviction(name)
    except UsageError as error:  # worded for an option that nobody typed here
        raise ValueError("no eviction policy of moe-tool has this name") from error
    return name


EvictionName = Annotated[str, Field(pattern=r"^[a-z0-9+:=,\-]{1,128}$"), AfterValidator(_known)]
"""As `--eviction` takes it"""
