"""Adapter of a bundle to EleutherAI's lm-evaluation-harness, with misses in the loop."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from moe_tool.artifacts.known_tokens import require_known_tokens
from moe_tool.artifacts.run_stats import RunStats
from moe_tool.errors import DataSourceError, UsageError
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.models.tokenizer import load_tokenizer
from moe_tool.progress import SILENT, Progress
from moe_tool.runtime.decoding_config import GenerateOptions
from moe_tool.runtime.generation import generate_ids
from moe_tool.runtime.run_options import RunOptions
from moe_tool.runtime.session import Session, open_session
from moe_tool.runtime.working_set import prefill_chunk

_MAX_GENERATED_TOKENS = 256
"""Default length of an answer, as in lm_eval"""
_UNUSED_WHEN_GREEDY = frozenset({"top_k", "top_p", "min_p"})


@dataclass(slots=True)
class _ReadContext:
    """A context already fed, reused for the next answer to the same question."""

    ids: list[int]
    cache: DynamicCache
    logits: torch.Tensor
    """[V] logits of the next token"""


class BundleLM(TemplateLM):
    """Model that answers lm_eval's requests one at a time, through the runtime of `run`.

    The context is the prompt, which every policy answers exactly. The answer's tokens are fed one
    per forward under the session's policy: one wide forward would hide what a lossy policy does
    (see `stepwise`). So the first token of an answer is always predicted exactly, as in a run, and
    one-token answers say nothing about a policy; with `decode_context` the policy applies from the
    second token of the context on. Under a lossy policy with residency `cache` every request starts
    with an empty cache, so that the order of requests does not matter.

    The session is opened at the first request: lm_eval has built all requests by then, so that
    their memory is counted.
    """

    def __init__(
        self,
        folder: Path,
        options: RunOptions,
        *,
        decode_context: bool = False,
        progress: Progress = SILENT,
    ) -> None:
        """Check the bundle; its weights are loaded later.

        Args:
            options: options of the session; its context limits the length of requests.
            decode_context: whether log-likelihoods feed the context token by token too.

        Raises:
            CorruptArtifactError, NotFoundError: the bundle is damaged or missing.
        """
        super().__init__()
        with BundleReader.open(folder) as bundle:
            self._vocabulary = bundle.manifest.shape.vocabulary
        self.tokenizer = load_tokenizer(folder)
        self.stats = RunStats()
        """Counters of all requests so far"""
        self.n_cut_contexts = 0
        """Requests whose context was too long"""
        self._folder, self._options = folder, options
        self._decode_context = decode_context
        self._progress = progress
        self._session: Session | None = None
        self._last_only: dict[str, int] = {}
        self._context: _ReadContext | None = None

    @property
    def session(self) -> Session:
        """The session, opened at first use.

        Raises:
            UsageError, BudgetError, CorruptArtifactError: as `open_session`.
        """
        if self._session is None:
            self._session = open_session(
                self._folder, self._options, tokenizer=self.tokenizer, progress=self._progress
            )
            if "logits_to_keep" in signature(self._session.model.forward).parameters:
                self._last_only = {"logits_to_keep": 1}
        return self._session

    def close(self) -> None:
        """Close the session."""
        self._context = None
        if self._session is not None:
            self._session.close()

    def __enter__(self) -> "BundleLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def max_length(self) -> int:
        """Positions of a request, answer included."""
        return self.session.plan.workload.positions

    @property
    def eot_token_id(self) -> int:
        """End-of-text token, or the begin-of-text token if there is none."""
        return self._special_token("eos_token_id", "bos_token_id")

    @property
    def prefix_token_id(self) -> int:
        """Token before a text without context: begin-of-text, or end-of-text if there is none."""
        return self._special_token("bos_token_id", "eos_token_id")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return token ids.

        With `add_special_tokens` None the tokenizer adds its special tokens, unless the text begins
        with the begin-of-text token already.

        Raises:
            DataSourceError: the model does not know one of the tokens.
        """
        if add_special_tokens is None:
            first = getattr(self.tokenizer, "bos_token", None)
            add_special_tokens = not (first and string.startswith(first))
        ids = list(self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"])
        require_known_tokens(ids, self._vocabulary, tokenizer=self.tokenizer)
        return ids

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood, whether greedy decoding gives it) of every answer.

        Args:
            requests: Instances of (context, answer). Contexts that are too long are cut at the
                beginning.

        Raises:
            DataSourceError: an answer has no tokens, or more than the context length.
        """
        scored = []
        # One by one, so that only one is in memory as token ids.
        for request in self._in_turn("loglikelihood", requests):
            scored += super().loglikelihood([request], disable_tqdm=True)
        return scored

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of whole texts, each token predicted once.

        A text starts after `prefix_token_id`; one that is too long is cut into windows of the
        context length, the last of which overlaps its predecessor.

        Args:
            requests: Instances of (text,).
        """
        sums = []
        for request in self._in_turn("loglikelihood_rolling", requests):
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [make_disjoint_window(window) for window in windows]
            sums.append(sum(self._score(context, answer)[0] for context, answer in pairs))
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the generated text of each request, up to the first stop sequence.

        Args:
            requests: Instances of (context, generation arguments). Contexts that are too long are
                cut at the beginning. Sampling is seeded by the position in the list.

        Raises:
            UsageError: an argument is not supported, or there is no room for the answer.
        """
        seed = self._options.seed
        return [
            self._generate(*request.args, seed=seed + index)
            for index, request in enumerate(self._in_turn("generate_until", requests))
        ]

    def _in_turn(self, task: str, requests: Sequence[Any]) -> Iterator[Any]:
        """Yield the requests and report progress."""
        self._progress.begin(task, len(requests), "requests")
        for request in requests:
            yield request
            self._progress.advance()
        self._progress.end()

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        return [self._score(context, answer) for _, context, answer in requests]

    @torch.inference_mode()
    def _score(self, context: list[int], answer: list[int]) -> tuple[float, bool]:
        """Return the log-likelihood of the answer, and whether greedy decoding gives it."""
        session = self.session
        room = self.max_length + 1 - len(answer)  # the last token of the answer is not fed
        if not answer or room < 1:
            raise DataSourceError(
                f"an answer of {len(answer)} tokens cannot be scored in a context of "
                f"{self.max_length}",
                hint="another task, or a larger --context where the model allows it",
            )
        self.n_cut_contexts += len(context) > room
        total, is_greedy = 0.0, True
        try:
            read = self._read(context[-room:])
            logits = read.logits  # [V]
            for position, token in enumerate(answer):
                total += float(torch.log_softmax(logits.float(), dim=-1)[token])
                is_greedy = is_greedy and int(logits.argmax()) == token
                if position + 1 < len(answer):
                    logits = self._feed(read.cache, [token])
        finally:
            session.prompt_tokens = None
            self._collect()
        return total, is_greedy

    def _read(self, ids: list[int]) -> _ReadContext:
        """Feed a context, or cut the cached one back if it is the same."""
        self.session.prompt_tokens = 1 if self._decode_context else len(ids)
        self._start_request()
        last = self._context
        if last is not None and last.ids == ids:
            n_behind = last.cache.get_seq_length() - len(ids)
            if n_behind:
                last.cache.crop(-n_behind)  # by a count
            return last
        self._context = last = None  # freed before the next one is made
        chunk = prefill_chunk(self.session.plan.workload)
        edges = [0, *range(1, len(ids))] if self._decode_context else [*range(0, len(ids), chunk)]
        cache = self.session.new_cache()
        for start, end in zip(edges, [*edges[1:], len(ids)], strict=True):
            logits = self._feed(cache, ids[start:end])
        read = _ReadContext(ids=ids, cache=cache, logits=logits)
        if not self._is_cache_lossy and _can_be_cut(cache):
            self._context = read
        return read

    def _feed(self, cache: DynamicCache, ids: list[int]) -> torch.Tensor:
        """Run one forward and return the logits after the last token, [V]."""
        output = self.session.model(
            input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True, **self._last_only
        )
        logits: torch.Tensor = output.logits[0, -1]
        return logits

    def _generate(self, context: str, arguments: Mapping[str, Any], *, seed: int) -> str:
        wanted: dict[str, Any] = dict(
            normalize_gen_kwargs(dict(arguments), default_max_gen_toks=_MAX_GENERATED_TOKENS)
        )
        end = self.tokenizer.decode([self.eot_token_id])
        until = handle_stop_sequences(wanted.pop("until"), eos=end)
        n_tokens = wanted.pop("max_gen_toks")
        temperature = float(wanted.pop("temperature", 0.0))
        if not wanted.pop("do_sample"):
            temperature = 0.0
        _require_known(wanted, is_greedy=temperature == 0)
        room = self.max_length - n_tokens
        if room < 1:
            raise UsageError(
                f"the task asks for {n_tokens} generated tokens, which leaves no room in a context "
                f"of {self.max_length}",
                hint="a larger --context where the model allows it, or a task with a smaller "
                "max_gen_toks",
            )
        ids = self.tok_encode(context) or [self.prefix_token_id]
        self.n_cut_contexts += len(ids) > room
        ids = ids[-room:]
        self._context = None  # generation has a cache of its own
        self._start_request()
        options = GenerateOptions(max_tokens=n_tokens, temperature=temperature, seed=seed)
        text = _TextUntil(until)
        try:
            if generate_ids(self.session, [ids], options, on_text=text.add).interrupted:
                raise KeyboardInterrupt
        except _StopFound:
            pass
        finally:
            self._collect()
        return str(postprocess_generated_text(text.text, until, None))

    @property
    def _is_cache_lossy(self) -> bool:
        """Whether answers depend on the contents of the expert cache."""
        runner = self.session.runner
        return runner.policy.is_lossy and runner.residency == "cache"

    def _start_request(self) -> None:
        if self._is_cache_lossy:
            self.session.empty_cache()
        self.session.runner.stats = RunStats()

    def _collect(self) -> None:
        """Add the session's counters of the request."""
        self.stats += self.session.runner.stats
        self.session.runner.stats = RunStats()

    def _special_token(self, *names: str) -> int:
        for name in names:
            token = getattr(self.tokenizer, name, None)
            if token is not None:
                return int(token)
        raise UsageError(
            "the bundle's tokenizer has neither a begin-of-text nor an end-of-text token"
        )


class _StopFound(Exception):
    """Signal that the text contains a stop sequence."""


class _TextUntil:
    """Text that grows until it contains a stop sequence."""

    def __init__(self, until: Sequence[str]) -> None:
        self.text = ""
        self._until = [word for word in until if word]

    def add(self, piece: str) -> None:
        self.text += piece
        if any(word in self.text for word in self._until):
            raise _StopFound


def _can_be_cut(cache: DynamicCache) -> bool:
    """Return whether positions can be cut off the end: no sliding window, no recurrent state."""
    plain = (isinstance(layer, DynamicLayer) and not layer.is_sliding for layer in cache.layers)
    return bool(cache.is_croppable) and all(plain)


def _require_known(wanted: Mapping[str, Any], *, is_greedy: bool) -> None:
    unknown = sorted(wanted.keys() - (_UNUSED_WHEN_GREEDY if is_greedy else frozenset()))
    unknown = [name for name in unknown if wanted[name] is not None]
    if unknown:
        raise UsageError(
            f"the task generates with {', '.join(unknown)}, which is not supported",
            hint="choose a task that needs only until, max_gen_toks, do_sample and temperature",
        )
