"""Token sequences of one length, packed from documents, with a held-out part."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from moe_tool.artifacts.known_tokens import require_known_tokens
from moe_tool.artifacts.router_trace import TracedTokens
from moe_tool.errors import DataSourceError, UsageError
from moe_tool.progress import SILENT, Progress
from moe_tool.text.sources import TextSource, read_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_logger = logging.getLogger(__name__)
_GUESSED_CHARACTERS_PER_TOKEN = 4
_MAX_CHARACTERS_PER_BATCH = 4_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSequences(TracedTokens):
    """Sequences ordered by domain, then in the order of the documents."""

    sources: tuple[str, ...]
    """`domain=spec` of each source."""
    seed: int
    """Seed of the order of documents and of the held-out part."""


def build_sequences(
    sources: Sequence[TextSource],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    vocabulary: int,
    n_tokens: int,
    seq_len: int,
    holdout: float,
    seed: int,
    offline: bool = False,
    progress: Progress = SILENT,
) -> TokenSequences:
    """Return about `n_tokens` tokens of the sources as whole sequences, in equal shares by domain.

    Each document is encoded with the tokenizer's special tokens and closed with its end-of-text
    token if it has one; the documents of a domain are joined and cut every `seq_len` tokens, so a
    document may continue in the next sequence. If a domain is short of text, others give more.

    The held-out part of each domain is one run of adjacent sequences, round(holdout * n) and at
    least one of two, placed by `seed` where it shares the fewest documents with the rest. Sequences
    picked at random would mostly share documents.

    Args:
        vocabulary: V of the model that the tokens are for.
        n_tokens: rounded to whole sequences, at least one per domain.
        seq_len: S, tokens per sequence, at least 2.
        holdout: share of each domain's sequences to hold out, 0 to below 1.

    Raises:
        UsageError: n_tokens, seq_len or holdout is out of range.
        DataSourceError: a source is too short, unreadable, or has a token unknown to the model.
        NotFoundError: a source is missing or cannot be reached.
    """
    _check_arguments(n_tokens, seq_len, holdout)
    n_sequences = max(round(n_tokens / seq_len), len(sources))
    streams = []
    for source in sources:
        documents = read_documents(source, seed=seed, offline=offline)
        streams.append(_TokenStream(source, documents, tokenizer, seq_len))
    n_per_domain = _fill(streams, n_sequences, seq_len=seq_len, progress=progress)
    n_found = sum(n_per_domain)
    if n_found < n_sequences:
        _logger.warning(
            "the text sources have only %d of the %d requested tokens",
            n_found * seq_len,
            n_sequences * seq_len,
        )
    return _cut(streams, n_per_domain, vocabulary=vocabulary, holdout=holdout, seed=seed)


def _cut(
    streams: Sequence["_TokenStream"],
    n_per_domain: Sequence[int],
    *,
    vocabulary: int,
    holdout: float,
    seed: int,
) -> TokenSequences:
    """Return so many sequences of each domain, some of them held out."""
    rng = np.random.default_rng(seed)
    ids, documents, held_out = [], [], []
    first_document = 0
    for stream, n in zip(streams, n_per_domain, strict=True):
        domain_ids, domain_documents = stream.sequences(n)  # each [n, S]
        ids.append(domain_ids)
        documents.append(domain_documents + first_document)
        held_out.append(_choose_held_out(domain_documents, holdout=holdout, rng=rng))
        first_document = int(documents[-1][-1, -1]) + 1
        require_known_tokens([domain_ids.max()], vocabulary, tokenizer=stream.tokenizer)
    sources = [stream.source for stream in streams]
    return TokenSequences(
        ids=np.concatenate(ids),
        domain=np.repeat(np.arange(len(sources), dtype=np.int16), n_per_domain),
        document=np.concatenate(documents),
        held_out=np.concatenate(held_out),
        domains=tuple(source.domain for source in sources),
        sources=tuple(f"{source.domain}={source.spec}" for source in sources),
        seed=seed,
    )


def _check_arguments(n_tokens: int, seq_len: int, holdout: float) -> None:
    if n_tokens < 1:
        raise UsageError(f"--tokens {n_tokens}: at least 1 is needed")
    if seq_len < 2:
        raise UsageError(f"--seq-len {seq_len}: at least 2 is needed, a token and the next one")
    if not 0 <= holdout < 1:
        raise UsageError(f"--holdout {holdout}: a share from 0 to below 1 is needed")


@dataclass(slots=True)
class _TokenStream:
    """Tokens of one source, read as far as needed."""

    source: TextSource
    documents: Iterator[str]
    tokenizer: "PreTrainedTokenizerBase"
    seq_len: int
    n_tokens: int = 0
    n_told: int = 0
    is_exhausted: bool = False
    encoded: list[np.ndarray] = field(default_factory=list)

    def read_on(self, wanted: int, progress: Progress) -> None:
        """Read until there are `wanted` tokens or no more text."""
        while True:
            step = min(self.n_tokens, wanted) - self.n_told
            if step > 0:
                self.n_told += step
                progress.advance(step)
            if self.n_tokens >= wanted or self.is_exhausted:
                return
            batch = self._next_batch((wanted - self.n_tokens) * _GUESSED_CHARACTERS_PER_TOKEN)
            encoded = _encode(self.tokenizer, batch)
            self.encoded += encoded
            self.n_tokens += sum(map(len, encoded))

    def sequences(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the first n sequences: ids, and document numbers from 0, each [n, S] int32."""
        lengths = [len(ids) for ids in self.encoded]
        documents = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        ids, shape = np.concatenate(self.encoded), (n, self.seq_len)
        n_used = n * self.seq_len
        return ids[:n_used].reshape(shape), documents[:n_used].reshape(shape)

    def _next_batch(self, n_characters: int) -> list[str]:
        batch: list[str] = []
        size = 0
        while size < min(n_characters, _MAX_CHARACTERS_PER_BATCH):
            text = next(self.documents, None)
            if text is None:
                self.is_exhausted = True
                break
            batch.append(text)
            size += len(text)
        return batch


def _encode(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[np.ndarray]:
    """Return each text's ids, [t] int32, closed with the end-of-text token if there is one."""
    if not texts:
        return []
    encoded = tokenizer(
        texts,
        add_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    end = tokenizer.eos_token_id
    rows = []
    for ids in encoded["input_ids"]:
        is_closed = end is None or (len(ids) > 0 and ids[-1] == end)
        rows.append(np.array(ids if is_closed else [*ids, end], np.int32))
    return rows


def _fill(
    streams: list[_TokenStream], n_sequences: int, *, seq_len: int, progress: Progress
) -> list[int]:
    """Read the streams and return the number of sequences of each: equal, unless one is short."""
    limits = [n_sequences] * len(streams)
    progress.begin("tokenize", n_sequences * seq_len, "tokens")
    while True:
        shares = _fair_shares(n_sequences, limits)
        for index, stream in enumerate(streams):
            stream.read_on(shares[index] * seq_len, progress)
            limits[index] = stream.n_tokens // seq_len if stream.is_exhausted else n_sequences
            if limits[index] == 0:
                raise DataSourceError(
                    f"text source {stream.source.domain}={stream.source.spec}:"
                    f" {stream.n_tokens} tokens, fewer than one sequence of {seq_len}",
                    hint="give more text or a smaller --seq-len",
                )
        if all(share <= limit for share, limit in zip(shares, limits, strict=True)):
            progress.end()
            return shares


def _fair_shares(n_wanted: int, limits: list[int]) -> list[int]:
    """Return shares that add up to `n_wanted`, or to all limits, none above its limit.

    Shares below their limits are equal, or one larger in the first streams.
    """
    shares = [0] * len(limits)
    left = n_wanted
    while left and (able := [i for i, limit in enumerate(limits) if shares[i] < limit]):
        step = max(left // len(able), 1)
        for index in able[:left]:
            given = min(step, limits[index] - shares[index])
            shares[index] += given
            left -= given
    return shares


def _choose_held_out(
    documents: np.ndarray, *, holdout: float, rng: np.random.Generator
) -> np.ndarray:
    """Return the sequences to hold out, [n] bool, from the document of each token, [n, S]."""
    n = len(documents)
    n_held = min(round(n * holdout), n - 1)
    if holdout > 0 and n >= 2:
        n_held = max(n_held, 1)
    held_out = np.zeros(n, bool)
    if n_held < 1:
        return held_out
    goes_on = np.concatenate(
        [[False], documents[1:, 0] == documents[:-1, -1], [False]]
    )  # [n + 1]: cut i splits a document
    starts = np.arange(n - n_held + 1)
    n_split = goes_on[starts].astype(int) + goes_on[starts + n_held]
    start = int(rng.choice(starts[n_split == n_split.min()]))
    held_out[start : start + n_held] = True
    return held_out
