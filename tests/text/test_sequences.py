import logging
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from moe_tool.errors import DataSourceError, UsageError
from moe_tool.text import sequences
from moe_tool.text.sequences import TokenSequences, build_sequences
from moe_tool.text.sources import TextSource, parse_sources, read_documents
from moe_tool.text.text_blocks import split_text

BOS, EOS, FIRST_LETTER = 0, 1, 2


def _letter_tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter a-z (ids 2..27) and for line ends, <s> in front; everything else: 29."""
    letters = {letter: FIRST_LETTER + i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz\n")}
    vocabulary = {"<s>": BOS, "</s>": EOS, **letters, "?": 29}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


TOKENIZER = _letter_tokenizer()
VOCABULARY = 30
DOCUMENTS = st.lists(st.text("abcdefghij", min_size=1, max_size=40), min_size=1, max_size=30)


def _build(
    documents: dict[str, list[str]], *, n_tokens: int, seq_len: int, holdout: float = 0.25
) -> TokenSequences:
    patch = pytest.MonkeyPatch()
    patch.setattr(sequences, "read_documents", lambda source, **_: iter(documents[source.domain]))
    try:
        return build_sequences(
            [TextSource(domain=domain, spec="./x.txt") for domain in documents],
            TOKENIZER,
            vocabulary=VOCABULARY,
            n_tokens=n_tokens,
            seq_len=seq_len,
            holdout=holdout,
            seed=3,
        )
    finally:
        patch.undo()


@given(DOCUMENTS, st.integers(2, 20), st.integers(1, 400))
@settings(max_examples=150, deadline=None)
def test_packing_is_the_stream_of_documents_cut_in_order(
    documents: list[str], seq_len: int, n_tokens: int
) -> None:
    stream = [
        (token, number)
        for number, text in enumerate(documents)
        for token in [BOS, *(ord(letter) - ord("a") + FIRST_LETTER for letter in text), EOS]
    ]
    n_expected = min(max(round(n_tokens / seq_len), 1), len(stream) // seq_len)
    if n_expected == 0:
        with pytest.raises(DataSourceError):
            _build({"a": documents}, n_tokens=n_tokens, seq_len=seq_len)
        return
    packed = _build({"a": documents}, n_tokens=n_tokens, seq_len=seq_len)
    assert packed.ids.shape == packed.document.shape == (n_expected, seq_len)
    expected = stream[: n_expected * seq_len]
    assert packed.ids.ravel().tolist() == [token for token, _ in expected]
    assert packed.document.ravel().tolist() == [number for _, number in expected]
    assert packed.ids.dtype == packed.document.dtype == np.int32


@given(st.lists(st.integers(2, 60), min_size=1, max_size=4), st.integers(1, 90))
@settings(max_examples=100, deadline=None)
def test_shares_are_equal_and_short_domains_are_made_up_for(
    available: list[int], n_wanted: int
) -> None:
    seq_len = 4  # a document of two letters is one sequence: <s> x y </s>
    documents = {f"d{i}": ["ab"] * n for i, n in enumerate(available)}
    packed = _build(documents, n_tokens=n_wanted * seq_len, seq_len=seq_len)
    given_ = np.bincount(packed.domain, minlength=len(available))
    n_total = min(max(n_wanted, len(available)), sum(available))
    assert given_.sum() == n_total
    assert (given_ >= 1).all()
    assert (given_ <= available).all()
    unmet = [n for n, most in zip(given_, available, strict=True) if n < most]
    if unmet:
        # Nobody who could give more gives less than another does, but for the odd one.
        assert max(given_) - min(unmet) <= 1


@given(st.integers(1, 40), st.floats(0, 0.95), st.integers(1, 200))
@settings(max_examples=100, deadline=None)
def test_held_out_is_one_run_of_the_share_asked_for(
    n_documents: int, holdout: float, n_letters: int
) -> None:
    packed = _build(
        {"a": ["a" * n_letters] * n_documents + ["b" * 20]},
        n_tokens=10_000,
        seq_len=8,
        holdout=holdout,
    )
    n = len(packed.held_out)
    expected = min(round(n * holdout), n - 1)
    if holdout > 0 and n >= 2:
        expected = max(expected, 1)
    assert packed.held_out.sum() == expected
    assert np.abs(np.diff(packed.held_out.astype(int))).sum() <= 2
    held = set(packed.document[packed.held_out].ravel())
    rest = set(packed.document[~packed.held_out].ravel())
    assert len(held & rest) <= 1


def test_document_numbers_run_on_over_the_domains() -> None:
    packed = _build({"a": ["abc", "de"], "b": ["xy", "z", "w"]}, n_tokens=100, seq_len=3)
    assert packed.domains == ("a", "b")
    assert packed.sources == ("a=./x.txt", "b=./x.txt")
    assert packed.domain.tolist() == [0, 0, 0, 1, 1, 1]
    # a: <s>abc</s> <s>de</s>; b: <s>xy</s> <s>z</s> <s>w</s>, cut after nine tokens.
    assert packed.document.tolist() == [
        [0, 0, 0],
        [0, 0, 1],
        [1, 1, 1],
        [2, 2, 2],
        [2, 3, 3],
        [3, 4, 4],
    ]


def test_too_little_text_is_used_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        packed = _build({"a": ["abcd"]}, n_tokens=100, seq_len=3)
    assert packed.ids.shape == (2, 3)
    assert "have only 6 of the 99 requested tokens" in caplog.text


def test_tokenizing_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Listener:
        told: ClassVar[list[object]] = []

        def begin(self, *task: object) -> None:
            self.told.append(task)

        def advance(self, amount: int = 1) -> None:
            self.told.append(amount)

        def end(self) -> None:
            self.told.append("end")

        def note(self, text: str) -> None:
            raise AssertionError(text)

    # 6 tokens of each are wanted at first; b has only 3, so that 3 more of a are taken.
    documents = {"a": ["abc"] * 9, "b": ["x"]}
    monkeypatch.setattr(
        sequences, "read_documents", lambda source, **_: iter(documents[source.domain])
    )
    build_sequences(
        [TextSource(domain=domain, spec="./x.txt") for domain in documents],
        TOKENIZER,
        vocabulary=VOCABULARY,
        n_tokens=12,
        seq_len=3,
        holdout=0.0,
        seed=3,
        progress=Listener(),
    )
    assert Listener.told[0] == ("tokenize", 12, "tokens")
    assert Listener.told[-1] == "end"
    assert Listener.told[1:-1] == [6, 3, 3]


@pytest.mark.parametrize(
    "wrong", [{"n_tokens": 0}, {"seq_len": 1}, {"holdout": 1.0}, {"holdout": -0.1}]
)
def test_arguments_out_of_range_are_usage_errors(wrong: dict[str, float]) -> None:
    arguments: dict[str, float] = {"n_tokens": 10, "seq_len": 4, "holdout": 0.25, **wrong}
    with pytest.raises(UsageError):
        build_sequences(
            parse_sources(["builtin"]), TOKENIZER, vocabulary=VOCABULARY, seed=0, **arguments
        )


def test_tokens_depend_on_seed_and_sources_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join("abcdefgh" * (n % 50) for n in range(2000)))
    sources = parse_sources([str(tmp_path / "a.txt"), "builtin:docs"])

    def build(seed: int, n_tokens: int = 4000) -> TokenSequences:
        return build_sequences(
            sources,
            TOKENIZER,
            vocabulary=VOCABULARY,
            n_tokens=n_tokens,
            seq_len=64,
            holdout=0.25,
            seed=seed,
        )

    first, again, other, longer = build(0), build(0), build(1), build(0, 40_000)
    assert (first.ids == again.ids).all()
    assert (first.held_out == again.held_out).all()
    assert (first.ids != other.ids).any()
    n_first = int((first.domain == 0).sum())
    assert (longer.ids[:n_first] == first.ids[:n_first]).all()


def test_a_small_builtin_sample_is_spread_over_many_documents() -> None:
    source = parse_sources(["builtin:code"])[0]
    blocks = [block for block, _ in zip(read_documents(source, seed=0), range(20), strict=False)]
    assert all(len(block.encode()) <= 16384 for block in blocks)
    assert len({block[:200] for block in blocks}) == 20


@given(st.text("a é\n", max_size=60).map(lambda text: text * 700))
@settings(max_examples=50, deadline=None)
def test_blocks_join_to_the_text(text: str) -> None:
    blocks = split_text(text)
    assert "".join(blocks).replace(" ", "").replace("\n", "") == text.replace(" ", "").replace(
        "\n", ""
    )
    assert all(0 < len(block.encode()) <= 16384 for block in blocks)
