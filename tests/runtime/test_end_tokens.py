"""A text ends at whatever token the settings, the configuration or the tokenizer call its end."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_tool.runtime.end_tokens import EndTokens, find_end_tokens
from tests.tiny_models import VOCABULARY, tiny_tokenizer

BOS, EOS, PAD = 256, 257, 258


def found(
    folder: Path, generation: object, config: dict[str, Any], tokenizer_end: str | None
) -> EndTokens:
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer: Any = tiny_tokenizer()
    tokenizer.eos_token = tokenizer_end
    return find_end_tokens(
        folder,
        generation_config=SimpleNamespace(eos_token_id=generation),
        tokenizer=tokenizer,
        vocabulary=VOCABULARY,
    )


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer_end", "ids", "said"),
    [
        (EOS, {"eos_token_id": EOS}, "<eos>", (EOS,), None),
        ([EOS, PAD], {"eos_token_id": EOS}, "<pad>", (EOS, PAD), None),
        # the chat's end of a turn is the tokenizer's alone
        (EOS, {"eos_token_id": EOS}, "<pad>", (EOS, PAD), "<pad> (258), as the tokenizer says"),
        (EOS, {"eos_token_id": [EOS, PAD]}, "<eos>", (EOS, PAD), "<pad> (258), as config.json"),
        (EOS, {"text_config": {"eos_token_id": PAD}}, "<eos>", (EOS, PAD), "<pad> (258), as con"),
        # nothing that could differ
        (None, {}, "<pad>", (PAD,), None),
        ([], {"eos_token_id": []}, None, (), None),
        ([], {"eos_token_id": EOS}, "<eos>", (EOS,), None),
        # what is no token of the model is passed over
        ([EOS, 10**6, -1, "x", True, 1.5], {"eos_token_id": "a"}, "<eos>", (EOS,), None),
    ],
)
def test_the_three_places_are_joined(
    generation: object,
    config: dict[str, Any],
    tokenizer_end: str | None,
    ids: tuple[int, ...],
    said: str | None,
    tmp_path: Path,
) -> None:
    ends = found(tmp_path, generation, config, tokenizer_end)
    assert ends.ids == ids
    assert (ends.note is None) == (said is None)
    if said is not None:
        assert ends.note is not None and said in ends.note


def test_a_class_default_of_the_configuration_is_no_end_token(tmp_path: Path) -> None:
    """Mixtral's class says 2 where config.json says nothing: that is a letter of this model."""
    assert found(tmp_path, EOS, {"model_type": "mixtral"}, "<eos>").ids == (EOS,)
