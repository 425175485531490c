"""Conversion of a prompt to token ids, through the model's chat template if it has one."""

from typing import Any

from moe_tool.artifacts.known_tokens import require_known_tokens
from moe_tool.errors import DataSourceError, UsageError


def encode_prompt(tokenizer: Any, prompt: str, *, raw: bool, vocabulary: int) -> list[int]:
    """Return the token ids of a prompt, as a user turn of the model's chat template if it has one
    and `raw` is False.

    Raises:
        UsageError: the prompt has no tokens, or the template refuses it or leaves it out.
        DataSourceError: a token id is outside the vocabulary.
    """
    if not prompt:
        raise UsageError("the prompt is empty", hint="give --prompt some text")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:  # bytes of the command line that are no UTF-8
        raise DataSourceError(
            f"the prompt is not UTF-8 text: character {error.start + 1} is a lone byte",
            hint="put the text into a UTF-8 file: --prompt-file FILE",
        ) from error
    if getattr(tokenizer, "chat_template", None) and not raw:
        text = _apply_template(tokenizer, prompt)
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    else:
        ids = list(tokenizer(prompt)["input_ids"])
    if not ids:
        raise UsageError("the prompt has no tokens", hint="give --prompt some text")
    require_known_tokens(ids, vocabulary, tokenizer=tokenizer)
    return ids


def _apply_template(tokenizer: Any, prompt: str) -> str:
    """Return the turn as text, with the prompt given as a string or else as parts."""
    failure: Exception | None = None
    rendered = []
    for as_parts in (False, True):
        try:
            text = _render(tokenizer, prompt, as_parts=as_parts)
        # A template is a program of the model's author and may fail in any way.
        except Exception as error:
            failure = failure or error
            continue
        if prompt.strip() in text:
            return text
        rendered.append((as_parts, text))
    for as_parts, text in rendered:
        # The template may rewrite the prompt: it is ignored only if another one changes nothing.
        if text != _render(tokenizer, f"{prompt} {prompt}", as_parts=as_parts):
            return text
    if failure is not None:
        raise UsageError(
            f"the model's chat template does not take this prompt: {str(failure)[:300]}",
            hint="--raw leaves the template out",
        ) from failure
    raise UsageError(
        "the model's chat template leaves the prompt out of its text",
        hint="--raw leaves the template out",
    )


def _render(tokenizer: Any, prompt: str, *, as_parts: bool) -> str:
    # Templates of multimodal families find no parts in a string.
    content = [{"type": "text", "text": prompt}] if as_parts else prompt
    turns = [{"role": "user", "content": content}]
    return str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
