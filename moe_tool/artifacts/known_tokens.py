"""Check that the model has an embedding for every token of a tokenizer."""

from collections.abc import Iterable
from typing import Any

from moe_tool.errors import DataSourceError


def require_known_tokens(ids: Iterable[int], vocabulary: int, *, tokenizer: Any) -> None:
    """Refuse token ids that the model's embedding has no row for.

    Args:
        ids: token ids of a text or a prompt.
        vocabulary: V, the rows of the embedding.
        tokenizer: a transformers tokenizer, which names the token.

    Raises:
        DataSourceError: a token is unknown; the largest one is named.
    """
    largest = max((int(each) for each in ids), default=0)
    if largest < vocabulary:
        return
    word = tokenizer.convert_ids_to_tokens(largest)
    raise DataSourceError(
        f"the tokenizer makes token {largest} ({str(word)[:64]}), the model knows {vocabulary}",
        hint="use the tokenizer that belongs to the checkpoint, without tokens added since, "
        "or a text without them",
    )
