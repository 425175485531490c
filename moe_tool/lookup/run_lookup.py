"""Story of `run` for a lookup bundle: plan, load all but the table, generate, count rows."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from moe_tool.artifacts.run_result import StopReason
from moe_tool.available_memory import peak_rss_bytes
from moe_tool.budget.request import MemoryRequest
from moe_tool.errors import UsageError
from moe_tool.formats.lookup_bundle import LookupBundle
from moe_tool.lookup.disk_rows import checked_model
from moe_tool.lookup.lookup_account import chunk_of
from moe_tool.lookup.open_lookup import OpenedLookup, open_lookup
from moe_tool.models.generation_settings import read_generation_settings
from moe_tool.models.kv_cache import new_kv_cache
from moe_tool.models.mole.config import MoleConfig
from moe_tool.models.mole.modeling import MoleForCausalLM
from moe_tool.models.tokenizer import load_tokenizer
from moe_tool.progress import SILENT, Progress
from moe_tool.runtime.decoding_config import GenerateOptions, overridden
from moe_tool.runtime.end_tokens import EndTokens, find_end_tokens, stop_reason, until_end
from moe_tool.runtime.prompts import encode_prompt
from moe_tool.runtime.text_stream import OnText, TextStream
from moe_tool.runtime.working_set import positions_within
from moe_tool.store.throttle import Throttle


@dataclass(frozen=True, slots=True, kw_only=True)
class LookupResult:
    """A continued prompt. Rows are read once per forward for each distinct token of it."""

    text: str
    token_ids: tuple[int, ...]
    """Generated tokens, an end-of-text token included"""
    prompt_tokens: int
    rows_read: int
    """Rows read, for prompt and decoding"""
    row_bytes: int
    """Size of one row"""
    row_bytes_read: int
    table_bytes_on_disk: int
    """Size of the table, of which only rows are read"""
    form: str
    memory_budget_bytes: int
    seconds_to_first_token: float
    """Time from the call to the choice of the first token, loading not included"""
    seconds: float
    peak_rss_bytes: int
    interrupted: bool
    stop_reason: StopReason

    @property
    def generated_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def tokens_per_second(self) -> float:
        """Rate of the tokens after the first; 0 without any."""
        seconds = self.seconds - self.seconds_to_first_token
        return max(0, self.generated_tokens - 1) / seconds if seconds > 0 else 0.0


def run_lookup(
    folder: Path,
    prompt: str,
    *,
    memory: MemoryRequest | None,
    context: int,
    threads: int | None,
    generation: GenerateOptions,
    throttle: Throttle | None = None,
    on_text: OnText | None = None,
    progress: Progress = SILENT,
) -> LookupResult:
    """Open a lookup bundle for one prompt and generate; its table stays on disk.

    Arguments are those of `open_lookup`.

    Raises:
        UsageError: an empty prompt, or one that leaves no room in the context.
        BudgetError: the memory budget does not suffice.
        CorruptArtifactError, NotFoundError, StorageError: the bundle is damaged or missing.
        DataSourceError: the model does not know a token of the prompt.
    """
    bundle = LookupBundle.open(folder)
    tokenizer = load_tokenizer(folder)
    ids = encode_prompt(
        tokenizer, prompt, raw=generation.raw, vocabulary=bundle.manifest.vocabulary
    )
    positions = _positions(checked_model(bundle).config, context, len(ids), generation.max_tokens)
    with open_lookup(
        bundle,
        memory=memory,
        positions=positions,
        threads=threads,
        throttle=throttle,
        progress=progress,
    ) as opened:
        room = positions - len(ids)
        return _generate(opened, tokenizer, ids, generation, on_text, room=room, progress=progress)


def _positions(config: MoleConfig, context: int, prompt_tokens: int, max_tokens: int) -> int:
    """Return the positions of the prompt and its continuation."""
    most = positions_within(config, context)
    if prompt_tokens >= most:
        raise UsageError(
            f"the prompt has {prompt_tokens} tokens, which leaves no room in a context of {most}",
            hint="a shorter prompt, or a larger --context if the model has one",
        )
    return min(most, prompt_tokens + max_tokens)


def _generate(
    opened: OpenedLookup,
    tokenizer: Any,
    ids: list[int],
    options: GenerateOptions,
    on_text: OnText | None,
    *,
    room: int,
    progress: Progress,
) -> LookupResult:
    bundle, model, table = opened.bundle, opened.model, opened.table
    config = _decoding(bundle, model, tokenizer, options, room=room, progress=progress)
    stream = TextStream(tokenizer, on_text)
    torch.manual_seed(options.seed)
    begun, interrupted = time.perf_counter(), False
    prompt = torch.tensor([ids])
    try:
        with torch.inference_mode():
            model.generate(  # type: ignore[misc]
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                past_key_values=new_kv_cache(model.config, n_positions=len(ids) + room),
                generation_config=config,
                streamer=stream,
            )
    except KeyboardInterrupt:
        interrupted = True
        stream.end()
    ended = time.perf_counter()
    stops = frozenset(config.eos_token_id or ())
    row = until_end((stream.token_ids or [[]])[0], stops)
    return LookupResult(
        text=tokenizer.decode(list(row), skip_special_tokens=True),
        token_ids=row,
        prompt_tokens=len(ids),
        rows_read=table.rows.bytes_read // bundle.manifest.row_bytes,
        row_bytes=bundle.manifest.row_bytes,
        row_bytes_read=table.rows.bytes_read,
        table_bytes_on_disk=bundle.manifest.table_bytes,
        form=bundle.manifest.form,
        memory_budget_bytes=opened.account.budget_bytes,
        seconds_to_first_token=(stream.first_token_at or ended) - begun,
        seconds=ended - begun,
        peak_rss_bytes=peak_rss_bytes(),
        interrupted=interrupted,
        stop_reason=stop_reason(
            row, stops, room=room, max_tokens=options.max_tokens, interrupted=interrupted
        ),
    )


def _decoding(
    bundle: LookupBundle,
    model: MoleForCausalLM,
    tokenizer: Any,
    options: GenerateOptions,
    *,
    room: int,
    progress: Progress,
) -> GenerationConfig:
    """Return how tokens are chosen, and where a text ends."""
    settings = read_generation_settings(bundle.folder) or model.generation_config
    ends = find_end_tokens(
        bundle.folder,
        generation_config=settings,
        tokenizer=tokenizer,
        vocabulary=bundle.manifest.vocabulary,
    )
    if ends.note is not None and not options.ignore_eos:
        progress.note(ends.note)
    return overridden(
        settings,
        options,
        max_new_tokens=min(options.max_tokens, room),
        pad=_pad(tokenizer, ends, bundle.manifest.vocabulary),
        ends=ends,
        chunk=chunk_of(model.config),
    )


def _pad(tokenizer: Any, ends: EndTokens, vocabulary: int) -> int:
    candidates = (tokenizer.pad_token_id, *ends.ids, 0)
    return next(int(each) for each in candidates if each is not None and 0 <= each < vocabulary)
