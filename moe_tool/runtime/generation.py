"""A prompt becomes text: transformers generates, the session's experts answer, everything is
counted."""

import copy
import time
from collections.abc import Sequence, Set
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
from moe_tool.models.generation_settings import FOLLOWED_SETTINGS
from moe_tool.models.tokenizer import load_tokenizer
from moe_tool.progress import SILENT, Progress
from moe_tool.runtime.end_tokens import EndTokens, find_end_tokens
from moe_tool.runtime.open_stores import staying_by_form
from moe_tool.runtime.prompts import encode_prompt
from moe_tool.runtime.run_options import RunOptions
from moe_tool.runtime.session import Session, open_session
from moe_tool.runtime.text_stream import OnText, TextStream
from moe_tool.runtime.working_set import prefill_chunk
from moe_tool.runtime.write_trace import write_trace

_MIN_TEMPERATURE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """How tokens are chosen."""

    max_tokens: int = 128
    temperature: float = 0.0
    """0 takes the most probable token"""
    seed: int = 0
    """Seeds sampling"""
    raw: bool = False
    """Leave the model's chat template out"""
    ignore_eos: bool = False
    """Go on after an end-of-text token"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """Token ids of a batch."""

    token_ids: tuple[tuple[int, ...], ...]
    """One row per sequence, up to and with its end-of-text token"""
    stop_reasons: tuple[StopReason, ...]
    """One per sequence"""
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

    The KV cache is planned for this prompt and `max_tokens`, not for the whole context. A trace of
    the run is written to `trace_path`.

    Raises:
        UsageError: an empty prompt, or one that leaves no room in the context.
        BudgetError: the memory budget does not suffice.
        CorruptArtifactError, NotFoundError: the bundle is damaged, or is none.
        DataSourceError: the model does not know a token of the prompt.
    """
    with BundleReader.open(folder) as bundle:  # what is no bundle is told so before anything else
        vocabulary = bundle.manifest.shape.vocabulary
    tokenizer = load_tokenizer(folder)
    ids = encode_prompt(tokenizer, prompt, raw=generation.raw, vocabulary=vocabulary)
    n_prompt = len(ids)
    if n_prompt < options.context:
        context = min(options.context, n_prompt + generation.max_tokens)
        options = replace(options, context=context, prompt=n_prompt)
    options = replace(options, record_trace=options.record_trace or trace_path is not None)
    with open_session(folder, options, tokenizer=tokenizer, progress=progress) as session:
        note = None if generation.ignore_eos else _end_tokens(session).note
        if note is not None:
            progress.note(note)
        result = generate(session, prompt, generation, on_text=on_text)
        if trace_path is not None:
            write_trace(session, trace_path, decode_seconds=result.decode_seconds)
        return result


def generate(
    session: Session, prompt: str, options: GenerateOptions, *, on_text: OnText | None = None
) -> RunResult:
    """Continue a prompt.

    Args:
        session: its counters start anew; what its expert cache holds stays.
        prompt: the text.
        options: how tokens are chosen.
        on_text: called with every piece of text as it comes.

    Raises:
        UsageError: an empty prompt, or one that leaves no room in the context.
        CorruptArtifactError, StorageError: an expert cannot be read.
    """
    ids = encode_prompt(
        session.tokenizer,
        prompt,
        raw=options.raw,
        vocabulary=session.manifest.shape.vocabulary,
    )
    made = generate_ids(session, [ids], options, on_text=on_text)
    text = session.tokenizer.decode(list(made.token_ids[0]), skip_special_tokens=True)
    return _result(session, made, text)


def generate_ids(
    session: Session,
    prompts: Sequence[Sequence[int]],
    options: GenerateOptions,
    *,
    on_text: OnText | None = None,
) -> Generated:
    """Continue a batch of prompts, given and returned as token ids; shorter ones are padded on the
    left.

    Ctrl-C ends it with the tokens chosen by then.

    Raises:
        UsageError: no prompt, an empty one, too many, or one that leaves no room in the context.
    """
    _check(session, prompts, options)
    pad = _pad_token(session, ends := _end_tokens(session))
    ids, mask = _padded(prompts, pad)
    width = ids.shape[1]
    room = session.plan.workload.positions - width
    config = _generation_config(
        session, options, max_new_tokens=min(options.max_tokens, room), pad=pad, ends=ends
    )
    session.runner.stats = RunStats()
    if session.runner.recorder is not None:
        session.runner.recorder.begin_run()
    session.prompt_tokens = width
    stream = TextStream(session.tokenizer, on_text)
    torch.manual_seed(options.seed)
    interrupted = False
    own_config, session.model.generation_config = session.model.generation_config, config
    started_at = time.perf_counter()
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
        interrupted = True
        stream.end()
    finally:
        session.prompt_tokens = None
        session.model.generation_config = own_config
    stops = frozenset(config.eos_token_id or ())
    rows = [_until_end(row, stops) for row in stream.token_ids or [[]] * len(prompts)]
    return Generated(
        token_ids=tuple(rows),
        stop_reasons=tuple(
            _stop_reason(row, stops, room=room, options=options, interrupted=interrupted)
            for row in rows
        ),
        started_at=started_at,
        first_token_at=stream.first_token_at,
        ended_at=time.perf_counter(),
        interrupted=interrupted,
    )


def _padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and attention mask, [B, S] each, padded on the left."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def _check(session: Session, prompts: Sequence[Sequence[int]], options: GenerateOptions) -> None:
    if not prompts or min(len(prompt) for prompt in prompts) == 0:
        raise UsageError("the prompt has no tokens", hint="give --prompt some text")
    if len(prompts) > session.plan.workload.batch:
        raise UsageError(
            f"{len(prompts)} prompts at once, the session was opened for "
            f"{session.plan.workload.batch}"
        )
    if options.max_tokens < 1:
        raise UsageError(f"--max-tokens {options.max_tokens}: at least 1 is needed")
    if not options.temperature >= 0 or options.temperature == float("inf"):
        raise UsageError(f"--temperature {options.temperature}: 0 or more is needed")
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
    """Return what to do where the context is full: only what the model allows."""
    most = context_length(session.model.config.get_text_config())
    if most is not None and most <= session.plan.workload.positions:
        return f"a shorter prompt: the model was made for {most} positions"
    return f"a shorter prompt, or a larger --context{'' if most is None else f', up to {most}'}"


def _generation_config(
    session: Session, options: GenerateOptions, *, max_new_tokens: int, pad: int, ends: EndTokens
) -> GenerationConfig:
    """The model's own generation settings, with ours on top."""
    config = GenerationConfig()  # type: ignore[no-untyped-call]
    for name in FOLLOWED_SETTINGS:
        value = getattr(session.model.generation_config, name, None)
        if value is not None:
            setattr(config, name, copy.deepcopy(value))
    config.max_new_tokens = max_new_tokens
    config.max_length = None
    config.min_length = config.min_new_tokens = None
    config.num_beams = config.num_return_sequences = 1
    config.return_dict_in_generate = False
    config.use_cache = True
    config.cache_implementation = None
    config.pad_token_id = pad
    config.prefill_chunk_size = prefill_chunk(session.plan.workload)
    config.eos_token_id = None if options.ignore_eos else list(ends.ids) or None
    config.do_sample = options.temperature > 0
    if config.do_sample:
        config.temperature = options.temperature
        _switch_off_what_means_nothing(config)
    else:
        config.temperature = config.top_p = config.top_k = None
    return config


def _switch_off_what_means_nothing(config: GenerationConfig) -> None:
    """Ranges that cannot be sampled from are how other runtimes write "off": top_k -1, top_p 0."""
    if config.top_k is not None and config.top_k < 1:
        config.top_k = 0  # None would be transformers' default, 50
    for name in ("top_p", "min_p", "typical_p"):
        value = getattr(config, name)
        if value is not None and not 0 < value < 1:
            setattr(config, name, None)


def _end_tokens(session: Session) -> EndTokens:
    return find_end_tokens(
        session.bundle.folder,
        generation_config=session.model.generation_config,
        tokenizer=session.tokenizer,
        vocabulary=session.manifest.shape.vocabulary,
    )


def _pad_token(session: Session, ends: EndTokens) -> int:
    config = session.model.generation_config
    candidates = (session.tokenizer.pad_token_id, config.pad_token_id, *ends.ids, 0)
    vocabulary = session.manifest.shape.vocabulary
    return next(int(each) for each in candidates if each is not None and 0 <= each < vocabulary)


def _until_end(row: list[int], stops: Set[int]) -> tuple[int, ...]:
    """A row without the padding that follows its end-of-text token."""
    for position, token in enumerate(row):
        if token in stops:
            return tuple(row[: position + 1])
    return tuple(row)


def _stop_reason(
    row: Sequence[int],
    stops: Set[int],
    *,
    room: int,
    options: GenerateOptions,
    interrupted: bool,
) -> StopReason:
    if row and row[-1] in stops:
        return "end_of_text"
    if interrupted:
        return "interrupted"
    return "context" if room < options.max_tokens else "max_tokens"


def _result(session: Session, made: Generated, text: str) -> RunResult:
    first = made.ended_at if made.first_token_at is None else made.first_token_at
    return RunResult(
        text=text,
        token_ids=made.token_ids[0],
        setup=run_setup(session),
        staying=staying_by_form(session.manifest, session.plan.rooms),
        prompt=session.runner.stats.prompt,
        decode=session.runner.stats.decode,
        quality=_quality(session),
        seconds_to_first_token=first - made.started_at,
        seconds=made.ended_at - made.started_at,
        peak_rss_bytes=peak_rss_bytes(),
        interrupted=made.interrupted,
        stop_reason=made.stop_reasons[0],
    )


def run_setup(session: Session) -> RunSetup:
    """Return how a session runs now."""
    return RunSetup(
        policy=session.runner.policy.name,
        residency=session.runner.residency,
        eviction=session.plan.eviction.name,
        prefetch=session.plan.prefetch,
        sparse_experts=session.runner.sparsity,
        threads=session.plan.threads.n_threads,
        memory_budget_bytes=session.plan.memory.budget_bytes,
        slots=session.plan.memory.n_slots,
    )


def _quality(session: Session) -> AnswerQuality:
    account, shadow = session.runner.account, session.shadow
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
    )
