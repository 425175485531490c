"""Conversion between sizes as typed ("24GiB") and int bytes."""

import re

from moe_tool.errors import UsageError

_UNITS = {
    "": 1,
    "b": 1,
    "k": 2**10,
    "kib": 2**10,
    "m": 2**20,
    "mib": 2**20,
    "g": 2**30,
    "gib": 2**30,
    "t": 2**40,
    "tib": 2**40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
MAX_BYTES = 2**60
"""Largest size accepted; every artifact can hold it"""
_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def parse_bytes(text: str) -> int:
    """Return the number of bytes that `text` names: "4GiB", "4G" (binary), "4GB" (decimal), "123".

    Raises:
        UsageError: the text is not a size, or exceeds MAX_BYTES.
    """
    match = _PATTERN.fullmatch(text)
    factor = _UNITS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise UsageError(
            f"'{text}' is not a size", hint="write it as 4GiB, 1500MB or a number of bytes"
        )
    size_bytes = float(match[1]) * factor
    if size_bytes > MAX_BYTES:
        raise UsageError(
            f"'{text}' is beyond any memory or disk", hint=f"{MAX_BYTES // 2**40}TiB is the most"
        )
    return int(size_bytes)


def format_bytes(size_bytes: int | float) -> str:
    """Return a size for people: "1.5 GiB", exact below one KiB."""
    if abs(size_bytes) < 2**10:
        return f"{int(size_bytes)} B"
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if abs(size_bytes) >= factor:
            return f"{size_bytes / factor:.2f} {unit}"
    return f"{size_bytes / 2**10:.1f} KiB"


def type_bytes(size_bytes: int) -> str:
    """Return a size as it can be typed, in the largest unit that leaves no remainder: "4GiB"."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size_bytes and size_bytes % factor == 0:
            return f"{size_bytes // factor}{unit}"
    return str(size_bytes)
