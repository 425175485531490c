"""From a prompt to token ids, through the model's chat template where it has one."""

from typing import Any

from moe_tool.errors import UsageError


def encode_prompt(tokenizer: Any, prompt: str, *, raw: bool) -> list[int]:
    """Return the token ids of a prompt, as one user turn of the model's chat template when it has
    one.

    Args:
        tokenizer: of transformers.
        prompt: the text.
        raw: leave the chat template out.

    Raises:
        UsageError: the prompt has no tokens, or the template refuses it.
    """
    if not prompt:
        raise UsageError("the prompt is empty", hint="give --prompt some text")
    if getattr(tokenizer, "chat_template", None) and not raw:
        ids = _apply_template(tokenizer, prompt)
    else:
        ids = list(tokenizer(prompt)["input_ids"])
    if not ids:
        raise UsageError("the prompt has no tokens", hint="give --prompt some text")
    return ids


def _apply_template(tokenizer: Any, prompt: str) -> list[int]:
    turns = [{"role": "user", "content": prompt}]
    try:
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    except (
        Exception
    ) as error:  # a template is a program of the model's author: it may fail in any way
        raise UsageError(
            f"the model's chat template does not take this prompt: {str(error)[:300]}",
            hint="--raw leaves the template out",
        ) from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
