"""Generation of text from a prompt by transformers, with a session's experts, with all counts."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import GenerationConfig

from moe_tool.artifacts.run_result import AnswerQuality, RunResult, RunSetup, StopReason
from moe_tool.artifacts.run_stats import RunStats
from moe_tool.available_memory import peak_rss_bytes
from moe_tool.errors import UsageError
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.models.context_length import context_length
from moe_tool.models.tokenizer import load_tokenizer
from moe_tool.progress import SILENT, Progress
from moe_tool.runtime.decoding_config import (
    GenerateOptions,
    decoding_config,
    end_tokens_of,
    pad_token,
)
from moe_tool.runtime.end_tokens import stop_reason, until_end
from moe_tool.runtime.open_stores import staying_by_form
from moe_tool.runtime.prompts import encode_prompt
from moe_tool.runtime.run_options import RunOptions
from moe_tool.runtime.session import Session, load_session
from moe_tool.runtime.text_stream import OnText, TextStream
from moe_tool.runtime.write_trace import write_trace

_MIN_TEMPERATURE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """Token ids of a batch."""

    token_ids: tuple[tuple[int, ...], ...]
    """Token ids of each sequence, up to and including its end-of-text token"""
    stop_reasons: tuple[StopReason, ...]
    """Reason of each sequence's end"""
    started_at: float
    first_token_at: float | None
    ended_at: float
    interrupted: bool


def run_prompt(
    folder: Path,
    prompt: str,
    *,
    options: RunOptions,
    generation: GenerateOptions,
    on_text: OnText | None = None,
    trace_path: Path | None = None,
    progress: Progress = SILENT,
) -> RunResult:
    """Open a bundle for one prompt, generate, and close it again.

    The KV cache is planned for this prompt and `max_tokens`, not for the whole context. If
    `trace_path` is given, a trace of the run is written there.

    Raises:
        UsageError: an empty prompt, or one that leaves no room in the context.
        BudgetError: the memory budget does not suffice.
        CorruptArtifactError, NotFoundError: the bundle is damaged or missing.
        DataSourceError: the model does not know a token of the prompt.
    """
    bundle = BundleReader.open(folder)  # first, so that a folder that is no bundle is refused first
    with bundle:
        tokenizer = load_tokenizer(folder)
        vocabulary = bundle.manifest.shape.vocabulary
        ids = encode_prompt(tokenizer, prompt, raw=generation.raw, vocabulary=vocabulary)
        options = _for_one_prompt(options, len(ids), generation, is_traced=trace_path is not None)
        with load_session(bundle, options, tokenizer=tokenizer, progress=progress) as session:
            note = None if generation.ignore_eos else end_tokens_of(session).note
            if note is not None:
                progress.note(note)
            result = _continue(session, ids, generation, on_text)
            if trace_path is not None:
                write_trace(session, trace_path, decode_seconds=result.decode_seconds)
            return result


def _for_one_prompt(
    options: RunOptions, prompt_tokens: int, generation: GenerateOptions, *, is_traced: bool
) -> RunOptions:
    """Return the options with just enough context for the prompt and its continuation."""
    if prompt_tokens < options.context:
        context = min(options.context, prompt_tokens + generation.max_tokens)
        options = replace(options, context=context, prompt_tokens=prompt_tokens)
    return replace(options, record_trace=options.record_trace or is_traced)


def generate(
    session: Session, prompt: str, options: GenerateOptions, *, on_text: OnText | None = None
) -> RunResult:
    """Continue a prompt; the session's counters are reset, its expert cache is kept. `on_text` is
    called with every piece of generated text.

    Raises:
        UsageError: an empty prompt, or one that leaves no room in the context.
        CorruptArtifactError, StorageError: an expert cannot be read.
    """
    vocabulary = session.manifest.shape.vocabulary
    ids = encode_prompt(session.tokenizer, prompt, raw=options.raw, vocabulary=vocabulary)
    return _continue(session, ids, options, on_text)


def _continue(
    session: Session, ids: Sequence[int], options: GenerateOptions, on_text: OnText | None
) -> RunResult:
    row_bytes_before = session.bundle.tables.bytes_read
    made = generate_ids(session, [ids], options, on_text=on_text)
    first = made.ended_at if made.first_token_at is None else made.first_token_at
    return RunResult(
        text=session.tokenizer.decode(list(made.token_ids[0]), skip_special_tokens=True),
        token_ids=made.token_ids[0],
        setup=run_setup(session),
        staying=staying_by_form(session.manifest, session.plan.rooms),
        prompt=session.runner.stats.prompt,
        decode=session.runner.stats.decode,
        quality=_quality(session),
        drift=None if session.runner.watch is None else session.runner.watch.seen(),
        row_bytes_read=session.bundle.tables.bytes_read - row_bytes_before,
        seconds_to_first_token=first - made.started_at,
        seconds=made.ended_at - made.started_at,
        peak_rss_bytes=peak_rss_bytes(),
        interrupted=made.interrupted,
        stop_reason=made.stop_reasons[0],
    )


def generate_ids(
    session: Session,
    prompts: Sequence[Sequence[int]],
    options: GenerateOptions,
    *,
    on_text: OnText | None = None,
) -> Generated:
    """Continue a batch of prompts, given and returned as token ids; shorter ones are padded on the
    left.

    Ctrl-C ends generation with the tokens chosen so far.

    Raises:
        UsageError: no prompt, an empty one, too many, or one that leaves no room in the context.
    """
    _check(session, prompts, options)
    prompt_tokens = max(len(prompt) for prompt in prompts)
    ends = end_tokens_of(session)
    pad = pad_token(session, ends)
    ids, mask = _pad_left(prompts, prompt_tokens, pad)
    room = session.plan.workload.positions - prompt_tokens
    config = decoding_config(
        session, options, max_new_tokens=min(options.max_tokens, room), pad=pad, ends=ends
    )
    session.runner.stats = RunStats()
    if session.runner.recorder is not None:
        session.runner.recorder.begin_run()
    session.prompt_tokens = prompt_tokens
    stream = TextStream(session.tokenizer, on_text)
    torch.manual_seed(options.seed)
    started_at = time.perf_counter()
    interrupted = not _decode(session, ids, mask, config, stream)
    stops = frozenset(config.eos_token_id or ())
    rows = [until_end(row, stops) for row in stream.token_ids or [[]] * len(prompts)]
    return Generated(
        token_ids=tuple(rows),
        stop_reasons=tuple(
            stop_reason(
                row, stops, room=room, max_tokens=options.max_tokens, interrupted=interrupted
            )
            for row in rows
        ),
        started_at=started_at,
        first_token_at=stream.first_token_at,
        ended_at=time.perf_counter(),
        interrupted=interrupted,
    )


def _decode(
    session: Session,
    ids: torch.Tensor,
    mask: torch.Tensor,
    config: GenerationConfig,
    stream: TextStream,
) -> bool:
    """Let transformers generate; return False if Ctrl-C interrupted it."""
    kept_config, session.model.generation_config = session.model.generation_config, config
    try:
        with torch.inference_mode():
            session.model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=mask,
                past_key_values=session.new_cache(),
                generation_config=config,
                streamer=stream,
            )
    except KeyboardInterrupt:
        stream.end()
        return False
    finally:
        session.prompt_tokens = None
        session.model.generation_config = kept_config
    return True


def _pad_left(
    prompts: Sequence[Sequence[int]], prompt_tokens: int, pad: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and attention mask, [B, S] int64 each."""
    ids = torch.full((len(prompts), prompt_tokens), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, prompt_tokens - len(prompt) :] = torch.tensor(prompt)
        mask[row, prompt_tokens - len(prompt) :] = 1
    return ids, mask


def _check(session: Session, prompts: Sequence[Sequence[int]], options: GenerateOptions) -> None:
    if not prompts or min(len(prompt) for prompt in prompts) == 0:
        raise UsageError("the prompt has no tokens", hint="give --prompt some text")
    if len(prompts) > session.plan.workload.batch:
        raise UsageError(
            f"{len(prompts)} prompts at once, but the session was opened for "
            f"{session.plan.workload.batch}"
        )
    if options.max_tokens < 1:
        raise UsageError(f"--max-tokens {options.max_tokens}: at least 1 is needed")
    if not options.temperature >= 0 or options.temperature == float("inf"):
        raise UsageError(
            f"--temperature {options.temperature}: a finite number from 0 on is needed",
            hint="--temperature 0 takes the likeliest token, 1 samples as the model was trained",
        )
    if 0 < options.temperature < _MIN_TEMPERATURE:
        raise UsageError(
            f"--temperature {options.temperature}: logits divided by it overflow",
            hint="--temperature 0 takes the likeliest token",
        )
    longest = max(len(prompt) for prompt in prompts)
    if longest >= session.plan.workload.positions:
        raise UsageError(
            f"the prompt has {longest} tokens, which leaves no room in a context of "
            f"{session.plan.workload.positions}",
            hint=_longer_context(session),
        )


def _longer_context(session: Session) -> str:
    """Return a hint against a full context that the model allows."""
    most = context_length(session.model.config.get_text_config())
    if most is not None and most <= session.plan.workload.positions:
        return f"a shorter prompt: the model was made for {most} positions"
    return f"a shorter prompt, or a larger --context{'' if most is None else f', up to {most}'}"


def run_setup(session: Session) -> RunSetup:
    """Return the settings that a session runs with now."""
    return RunSetup(
        policy=session.runner.policy.name,
        residency=session.runner.residency,
        eviction=session.plan.eviction.name,
        prefetch=session.plan.prefetch,
        sparse_experts=session.runner.sparsity,
        activations=session.plan.options.activations,
        table_bytes_on_disk=sum(session.plan.on_disk.values()),
        threads=session.plan.threads.n_threads,
        memory_budget_bytes=session.plan.memory.budget_bytes,
        slots=session.plan.memory.n_slots,
    )


def _quality(session: Session) -> AnswerQuality:
    account, shadow = session.runner.account, session.learner.shadow
    live, worth = session.runner.live, session.runner.worth
    has_prices = session.runner.policy.prices is not None
    n_prompt, n_judged = session.runner.stats.prompt.tokens, account.judged_tokens
    return AnswerQuality(
        expected_kl=account.nats_per_token if has_prices else None,
        expected_kl_limit=account.limit,
        exact_fallback_tokens=account.exact_tokens,
        prompt_expected_kl=account.prompt_spent / max(1, n_prompt)
        if session.runner.is_lossy_prompt and has_prices
        else None,
        shadow_tokens=0 if shadow is None else shadow.tokens,
        shadow_kl=None if shadow is None else shadow.nats_per_token,
        shadow_expected_kl=account.judged_spent / n_judged if n_judged and has_prices else None,
        shadow_seconds=0.0 if shadow is None else shadow.seconds,
        price_factor=None if live is None else live.bound,
        nats_per_mb=None if worth is None else worth.nats_per_mb,
    )
