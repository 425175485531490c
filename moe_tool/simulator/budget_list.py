"""Parser of the list of memory budgets in `simulate --memory`."""

from collections.abc import Sequence

from moe_tool.budget.request import MemoryRequest, parse_memory
from moe_tool.errors import UsageError

_STEP = 10


def parse_budgets(texts: Sequence[str]) -> list[MemoryRequest]:
    """Return the budgets of a list, each once.

    Args:
        texts: comma-separated lists of "50%", "4GiB", "min" or "10%..100%", in steps of 10.

    Raises:
        UsageError: a word is no budget.
    """
    found: dict[MemoryRequest, None] = {}
    for word in (word.strip() for text in texts for word in text.split(",")):
        first, dots, last = word.partition("..")
        if dots:
            low, high = _percent(first, word), _percent(last, word)
            if low > high:
                raise UsageError(f"--memory {word} is empty", hint="--memory 10%..100%")
            while low <= high:
                found[MemoryRequest(kind="share", share=low / 100)] = None
                low += _STEP
        else:
            found[_budget(word, word)] = None
    return list(found)


def _budget(text: str, word: str) -> MemoryRequest:
    try:
        request = parse_memory(text)
    except UsageError as error:
        raise UsageError(
            f"--memory {word} is not a budget: {error.message}",
            hint="write 10%..100%, 50%, 4GiB or min",
        ) from error
    if request.kind == "auto":
        raise UsageError(
            "--memory auto: the free memory of the machine that runs is not known here",
            hint="--memory 4GiB",
        )
    if request.kind == "share" and not request.share:
        raise UsageError(f"--memory {word}: above 0% up to 100% is possible", hint="10%..100%")
    return request


def _percent(text: str, word: str) -> float:
    request = _budget(text, word)
    if request.kind != "share":
        raise UsageError(f"--memory {word}: a range is of shares", hint="10%..100%")
    return round(100 * request.share, 6)
