"""Parser of the list of memory budgets in `simulate --memory`."""

import re
from collections.abc import Sequence

from moe_tool.byte_sizes import parse_bytes
from moe_tool.errors import UsageError

_SHARE = re.compile(r"(\d+(?:\.\d+)?)%")
_STEP = 10


def parse_budgets(texts: Sequence[str]) -> list[tuple[str, float | None]]:
    """Return (label, share of the experts) for each budget; the share of bytes and "min" is None.

    Args:
        texts: comma-separated lists of "50%", "4GiB", "min" or "10%..100%", in steps of 10.

    Raises:
        UsageError: a word is no budget.
    """
    found: dict[str, float | None] = {}
    for word in (word.strip() for text in texts for word in text.split(",")):
        first, dots, last = word.partition("..")
        if dots:
            low, high = _percent(first, word), _percent(last, word)
            if low > high:
                raise UsageError(f"--memory {word}: the range is empty", hint="--memory 10%..100%")
            value = low
            while value <= high:
                found[f"{value:g}%"] = value / 100
                value += _STEP
        elif _SHARE.fullmatch(word):
            found[f"{_percent(word, word):g}%"] = _percent(word, word) / 100
        elif word.lower() == "min":
            found["min"] = None
        else:
            try:
                parse_bytes(word)
            except UsageError as error:
                raise UsageError(
                    f"'{word}' is not a memory budget", hint="write 10%..100%, 50%, 4GiB or min"
                ) from error
            found[word] = None
    return list(found.items())


def _percent(text: str, word: str) -> float:
    match = _SHARE.fullmatch(text.strip())
    if match is None or not 0 < float(match[1]) <= 100:
        raise UsageError(
            f"--memory {word}: a share must be above 0% and at most 100%", hint="10%..100%"
        )
    return float(match[1])
