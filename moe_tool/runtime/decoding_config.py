"""Settings of `generate` in transformers: the model's, overridden by the user's options."""

import copy
from dataclasses import dataclass

from transformers import GenerationConfig

from moe_tool.models.generation_settings import FOLLOWED_SETTINGS
from moe_tool.runtime.end_tokens import EndTokens, find_end_tokens
from moe_tool.runtime.session import Session
from moe_tool.runtime.working_set import prefill_chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """How tokens are chosen."""

    max_tokens: int = 128
    temperature: float = 0.0
    """Sampling temperature; 0 takes the most probable token"""
    seed: int = 0
    """Seed of sampling"""
    raw: bool = False
    """Leave the model's chat template out"""
    ignore_eos: bool = False
    """Go on after an end-of-text token"""


def decoding_config(
    session: Session, options: GenerateOptions, *, max_new_tokens: int, pad: int, ends: EndTokens
) -> GenerationConfig:
    """Return the model's generation settings, overridden by the options."""
    return overridden(
        session.model.generation_config,
        options,
        max_new_tokens=max_new_tokens,
        pad=pad,
        ends=ends,
        chunk=prefill_chunk(session.plan.workload),
    )


def overridden(
    settings: GenerationConfig | None,
    options: GenerateOptions,
    *,
    max_new_tokens: int,
    pad: int,
    ends: EndTokens,
    chunk: int,
) -> GenerationConfig:
    """Return a model's settings, overridden by the options.

    Args:
        chunk: prompt tokens per sequence in one forward.
    """
    config = GenerationConfig()  # type: ignore[no-untyped-call]
    for name in FOLLOWED_SETTINGS:
        value = getattr(settings, name, None)
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
    config.prefill_chunk_size = chunk
    config.eos_token_id = None if options.ignore_eos else list(ends.ids) or None
    config.do_sample = options.temperature > 0
    if config.do_sample:
        config.temperature = options.temperature
        _switch_off_what_means_nothing(config)
    else:
        config.temperature = config.top_p = config.top_k = None
    return config


def _switch_off_what_means_nothing(config: GenerationConfig) -> None:
    """Remove limits that other runtimes read as "off": top_k -1, top_p 0."""
    if config.top_k is not None and config.top_k < 1:
        config.top_k = 0  # None would be transformers' default, 50
    for name in ("top_p", "min_p", "typical_p"):
        value = getattr(config, name)
        if value is not None and not 0 < value < 1:
            setattr(config, name, None)


def end_tokens_of(session: Session) -> EndTokens:
    return find_end_tokens(
        session.bundle.folder,
        generation_config=session.model.generation_config,
        tokenizer=session.tokenizer,
        vocabulary=session.manifest.shape.vocabulary,
    )


def pad_token(session: Session, ends: EndTokens) -> int:
    config = session.model.generation_config
    candidates = (session.tokenizer.pad_token_id, config.pad_token_id, *ends.ids, 0)
    vocabulary = session.manifest.shape.vocabulary
    return next(int(each) for each in candidates if each is not None and 0 <= each < vocabulary)
