"""Text comes in pieces that no later token can change."""

import torch

from moe_tool.runtime.text_stream import TextStream
from tests.tiny_models import tiny_tokenizer


def _stream(text: str) -> tuple[list[str], TextStream]:
    tokenizer = tiny_tokenizer()  # one token per byte
    pieces: list[str] = []
    stream = TextStream(tokenizer, pieces.append)
    stream.put(torch.tensor([tokenizer("prompt")["input_ids"]]))
    for token in tokenizer(text)["input_ids"]:
        stream.put(torch.tensor([token]))
    stream.end()
    return pieces, stream


def test_characters_of_several_bytes_come_whole() -> None:
    text = "naïve – 漢字 🙂\nend"
    pieces, stream = _stream(text)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
    assert len(stream.token_ids[0]) == len(text.encode())


def test_the_prompt_is_not_shown_and_the_first_token_is_timed() -> None:
    pieces, stream = _stream("ab")
    assert pieces == ["a", "b"]
    assert stream.first_token_at is not None


def test_bytes_that_never_become_a_character_are_shown_at_the_end() -> None:
    tokenizer = tiny_tokenizer()
    pieces: list[str] = []
    stream = TextStream(tokenizer, pieces.append)
    stream.put(torch.tensor([[0]]))
    stream.put(torch.tensor(tokenizer("é")["input_ids"][:1]))
    assert pieces == []
    stream.end()
    assert pieces == ["\ufffd"]


def test_a_batch_is_collected_without_showing_text() -> None:
    pieces: list[str] = []
    stream = TextStream(tiny_tokenizer(), pieces.append)
    stream.put(torch.tensor([[1, 2], [3, 4]]))
    stream.put(torch.tensor([5, 6]))
    stream.put(torch.tensor([7, 8]))
    stream.end()
    assert stream.token_ids == [[5, 7], [6, 8]]
    assert pieces == []
