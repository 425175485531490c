"""A prompt reaches the model through whatever chat template it has, or the run says that it does
not."""

from typing import Any

import pytest

from moe_tool.errors import DataSourceError, UsageError
from moe_tool.runtime.prompts import encode_prompt
from tests.tiny_models import VOCABULARY, tiny_tokenizer

TURNS = "{% for m in messages %}U:"
PARTS = TURNS + (
    "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}"
    ";A:{% endfor %}"
)


def encoded(template: str | None, prompt: str, *, raw: bool = False) -> str:
    """The prompt's tokens as text again: the tiny tokenizer has one per byte."""
    tokenizer: Any = tiny_tokenizer()
    tokenizer.chat_template = template
    ids = encode_prompt(tokenizer, prompt, raw=raw, vocabulary=VOCABULARY)
    return str(tokenizer.decode(ids))


@pytest.mark.parametrize(
    ("template", "prompt", "wanted"),
    [
        (None, "hello", "hello"),
        (TURNS + "{{ m['content'] }};A:{% endfor %}", "hello", "U:hello;A:"),
        (TURNS + "{{ m['content'] | trim }};A:{% endfor %}", "  hello\n", "U:hello;A:"),
        # multimodal families: a string has no parts, so nothing of it would be left
        (PARTS, "hello", "U:hello;A:"),
        (PARTS, "type", "U:type;A:"),
        # fails on a string, takes parts
        ("{{ messages[0]['content'][0]['text'] + '!' }}", "hello", "hello!"),
        # rewrites what it is given: not word for word, but not left out
        ("{{ messages[0]['content'] | tojson }}", 'say "a"', '"say \\"a\\""'),
        ("{{ messages[0]['content'] | upper }}", "hello", "HELLO"),
    ],
)
def test_the_prompt_survives_the_template(template: str | None, prompt: str, wanted: str) -> None:
    assert encoded(template, prompt) == wanted


@pytest.mark.parametrize("prompt", ["hello", "x"])
def test_a_template_without_the_prompt_is_refused(prompt: str) -> None:
    template = "[S]{% for m in messages %}{{ m['text'] }};A:{% endfor %}"
    with pytest.raises(UsageError, match="leaves the prompt out") as caught:
        encoded(template, prompt)
    assert caught.value.hint is not None and "--raw" in caught.value.hint
    assert encoded(template, prompt, raw=True) == prompt


def test_a_template_that_fails_on_both_forms_says_its_own_reason() -> None:
    with pytest.raises(UsageError, match="a system turn is needed"):
        encoded("{{ raise_exception('a system turn is needed') }}", "hello")


def test_a_token_that_the_model_lacks_is_refused() -> None:
    tokenizer: Any = tiny_tokenizer()
    with pytest.raises(DataSourceError, match=r"makes token 83 \(t\), the model knows 80"):
        encode_prompt(tokenizer, "the", raw=True, vocabulary=80)


def test_a_prompt_that_is_no_utf8_is_refused() -> None:
    with pytest.raises(DataSourceError, match="character 2"):
        encode_prompt(tiny_tokenizer(), "a\udcff", raw=True, vocabulary=300)
