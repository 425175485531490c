"""Three tasks of four answers each, made from held-out text, for models too small for public ones.

Each item is a context and four continuations of one length, the right one at a random place; the
answer is the likeliest one, as lm-evaluation-harness scores multiple choice. All but the first
token of a context are decoded under the policy, as in `evaluate`.

- next word: a word of the text among three others that begin a word somewhere in it;
- domain: the true continuation among those of three other texts;
- copy: a line of the text, once more, and its next word among three others of the line.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moe_tool.evaluation.stepwise import run_stepwise
from moe_tool.runtime.session import Session
from moe_tool.text.sources import TextSource, read_documents

N_ANSWERS = 4
_CONTEXT = 40
_LINE = 14
_LONG = 8
"""Tokens of a continuation in the domain task"""
_BATCH = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """N items with four continuations of L tokens."""

    name: str
    contexts: np.ndarray
    """[N, C] int64"""
    answers: np.ndarray
    """[N, 4, L] int64"""
    right: np.ndarray
    """[N] int64: the true continuation"""


def make_tasks(tokenizer, sources: Sequence[TextSource], *, n_items: int, seed: int) -> list[Task]:
    """Return the three tasks; with a single text the domain task takes other places of it."""
    streams = [token_stream(tokenizer, each, 400 * n_items, seed=seed) for each in sources]
    rng = np.random.default_rng(seed)
    begins = _word_beginnings(tokenizer, streams)
    return [
        _next_word(streams, begins, rng, n_items),
        _domain(streams, rng, n_items),
        _copy(streams, begins, rng, n_items),
    ]


def token_stream(tokenizer, source: TextSource, n_characters: int, *, seed: int) -> np.ndarray:
    """Return the beginning of a text as token ids, [n] int64."""
    text = ""
    for document in read_documents(source, seed=seed, offline=True):
        text += document
        if len(text) >= n_characters:
            break
    ids = tokenizer(text[:n_characters], add_special_tokens=False)["input_ids"]
    return np.array(ids, dtype=np.int64)


def _word_beginnings(tokenizer, streams: Sequence[np.ndarray]) -> np.ndarray:
    """Return which token ids begin a word and are letters, [V] bool."""
    n_tokens = int(max(stream.max() for stream in streams)) + 1
    found = np.zeros(n_tokens, dtype=bool)
    for token in np.unique(np.concatenate(streams)):
        text = tokenizer.convert_ids_to_tokens(int(token)).replace("\u0120", " ")
        text = text.replace("\u2581", " ")
        found[token] = text[:1] == " " and len(text) > 2 and text[1:].isalpha()
    return found


def _shuffled(answers: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the answers [N, 4, L], the right one given first, in a random order, and its place."""
    order = rng.permuted(np.tile(np.arange(N_ANSWERS), (len(answers), 1)), axis=1)
    return np.take_along_axis(answers, order[:, :, None], axis=1), order.argmin(axis=1)


def _places(
    streams: Sequence[np.ndarray], rng: np.random.Generator, before: int, after: int
) -> tuple[np.ndarray, int]:
    stream = streams[rng.integers(len(streams))]
    return stream, int(rng.integers(before, len(stream) - after))


def _next_word(streams, begins, rng, n_items: int) -> Task:
    contexts, answers = [], []
    words = np.concatenate([stream[begins[stream]] for stream in streams])
    while len(contexts) < n_items:
        stream, at = _places(streams, rng, _CONTEXT, 1)
        if not begins[stream[at]]:
            continue
        others = np.unique(words[rng.integers(len(words), size=64)])
        others = rng.permutation(others[others != stream[at]])[: N_ANSWERS - 1]
        if len(others) < N_ANSWERS - 1:
            continue
        contexts.append(stream[at - _CONTEXT : at])
        answers.append([stream[at], *others])
    shuffled, right = _shuffled(np.array(answers)[:, :, None], rng)
    return Task(name="next word", contexts=np.array(contexts), answers=shuffled, right=right)


def _domain(streams, rng, n_items: int) -> Task:
    contexts, answers = [], []
    for item in range(n_items):
        own = item % len(streams)
        at = int(rng.integers(_CONTEXT, len(streams[own]) - _LONG))
        found = [streams[own][at : at + _LONG]]
        for step in range(1, N_ANSWERS):
            other = streams[(own + step) % len(streams)]
            place = int(rng.integers(len(other) - _LONG))
            found.append(other[place : place + _LONG])
        contexts.append(streams[own][at - _CONTEXT : at])
        answers.append(found)
    shuffled, right = _shuffled(np.array(answers), rng)
    return Task(name="domain", contexts=np.array(contexts), answers=shuffled, right=right)


def _copy(streams, begins, rng, n_items: int) -> Task:
    contexts, answers = [], []
    while len(contexts) < n_items:
        stream, at = _places(streams, rng, 0, _LINE)
        line = stream[at : at + _LINE]
        words = np.flatnonzero(begins[line])
        words = words[words >= _LINE // 2]
        others = np.unique(line[begins[line]])
        if not len(words) or len(others) < N_ANSWERS:
            continue
        wanted = int(words[0])
        others = rng.permutation(others[others != line[wanted]])[: N_ANSWERS - 1]
        repeated = np.concatenate([line, line[:wanted]])
        contexts.append(repeated[-(_LINE + _LINE // 2) :])
        answers.append([line[wanted], *others])
    shuffled, right = _shuffled(np.array(answers)[:, :, None], rng)
    return Task(name="copy", contexts=np.array(contexts), answers=shuffled, right=right)


def accuracy(session: Session, task: Task) -> float:
    """Return the share of items that the session's policy answers right."""
    scores = _last_scores(session, task) if task.answers.shape[2] == 1 else _scores(session, task)
    return float((scores.argmax(axis=1) == task.right).mean())


def _last_scores(session: Session, task: Task) -> np.ndarray:
    """Return log-likelihoods of single tokens, [N, 4], from one forward over each context."""
    found = np.zeros((len(task.contexts), N_ANSWERS))
    n_context = task.contexts.shape[1]
    for rows in _batches(len(task.contexts)):
        ids = np.concatenate([task.contexts[rows], task.answers[rows, 0]], axis=1)

        def visit(position: int, logits: torch.Tensor, rows: slice = rows) -> None:
            if position == n_context - 1:
                wanted = torch.from_numpy(task.answers[rows, :, 0])
                found[rows] = logits.float().log_softmax(dim=-1).gather(1, wanted).numpy()

        run_stepwise(session, torch.from_numpy(ids), visit)
    return found


def _scores(session: Session, task: Task) -> np.ndarray:
    """Return log-likelihoods of whole continuations, [N, 4]."""
    n_items, n_context = task.contexts.shape
    contexts = np.repeat(task.contexts, N_ANSWERS, axis=0)
    ids = np.concatenate([contexts, task.answers.reshape(len(contexts), -1)], axis=1)
    found = np.zeros(len(ids))
    for rows in _batches(len(ids)):

        def visit(position: int, logits: torch.Tensor, rows: slice = rows) -> None:
            if position >= n_context - 1:
                wanted = torch.from_numpy(ids[rows, position + 1])
                chosen = logits.float().log_softmax(dim=-1).gather(1, wanted[:, None])
                found[rows] += chosen[:, 0].numpy()

        run_stepwise(session, torch.from_numpy(ids[rows]), visit)
    return found.reshape(n_items, N_ANSWERS)


def _batches(n_rows: int) -> list[slice]:
    return [slice(at, min(at + _BATCH, n_rows)) for at in range(0, n_rows, _BATCH)]


def half_width(shares: Mapping[str, float], n_items: int) -> float:
    """Return half a 95 % interval of the least certain of several accuracies."""
    return max(1.96 * (share * (1 - share) / n_items) ** 0.5 for share in shares.values())
