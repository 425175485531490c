"""Grammar of `--memory`: bytes, a share of the experts, a number of slots, min or auto."""

import re
from dataclasses import dataclass
from typing import Literal

from moe_tool.budget.sizes import parse_bytes, type_bytes
from moe_tool.errors import UsageError

_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRequest:
    """A memory budget as given by the user."""

    kind: Literal["bytes", "share", "slots", "min", "auto"]
    size_bytes: int = 0
    """Budget of the whole process, if `kind` is bytes"""
    share: float = 0.0
    """Share of the bundle's experts, 0 to 1, if `kind` is share"""
    n_slots: int = 0
    """Expert slots, if `kind` is slots (plans only)"""

    def __str__(self) -> str:
        """Return the request as it can be typed, exact to the byte."""
        if self.kind == "bytes":
            return type_bytes(self.size_bytes)
        if self.kind == "share":
            return f"{100 * self.share:g}%"
        return f"{self.n_slots} slots" if self.kind == "slots" else self.kind


AUTO = MemoryRequest(kind="auto")
EVERY_EXPERT = MemoryRequest(kind="share", share=1.0)


def parse_memory(text: str) -> MemoryRequest:
    """Return the request for "4GiB", "50%", "min" or "auto".

    Raises:
        UsageError: the text is none of these, or a share above 100 %.
    """
    word = text.strip().lower()
    if word == "min":
        return MemoryRequest(kind="min")
    if word == "auto":
        return AUTO
    percent = _PERCENT.fullmatch(text)
    if percent is not None:
        share = float(percent[1]) / 100
        if share > 1:
            raise UsageError(
                f"--memory {text} is more than all experts", hint="use 100% or less, or auto"
            )
        return MemoryRequest(kind="share", share=share)
    try:
        return MemoryRequest(kind="bytes", size_bytes=parse_bytes(text))
    except UsageError as error:
        raise UsageError(
            f"'{text}' is not a memory budget", hint="write 4GiB, 50%, min or auto"
        ) from error


def parse_memory_option(text: str | None) -> MemoryRequest | None:
    """Return the request of an option; None if it was not given.

    Raises:
        UsageError: the text is not a budget.
    """
    return None if text is None else parse_memory(text)
