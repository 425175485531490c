"""Patterns on module names match what `re` matches, in bounded time."""

import random
import re

import pytest

from moe_tool.models.stored_formats.name_pattern import MAX_CHARACTERS, NamePattern

NAMES = [
    "lm_head",
    "model.layers.0.self_attn.q_proj",
    "model.layers.12.mlp.experts.3.down_proj",
    "model.layers.12.mlp.shared_experts.gate_up_proj",
    "",
]
PATTERNS = [
    ".*",
    "lm_head",
    ".*down_proj$",
    r".*mlp\.(gate|up|gate_up|down)_proj.*",
    r"model\.layers\.[0-9]+\.mlp\.experts\.\d+\..*_proj",
    r"^model\.layers\.(?:1[0-9]|2)\..*(shared_)?experts",
    r".*layers\.\d{2}\.",
    r".*\.\d{1,}\.[^.]*$",
    "(.*)_proj",
    "head",
    "|lm",
    r"(\w\.?)+",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_known_patterns_match_as_re_does(pattern: str) -> None:
    for name in NAMES:
        assert NamePattern(pattern).matches(name) == bool(re.match(pattern, name)), name


def test_random_patterns_match_as_re_does() -> None:
    rng, tried = random.Random(7), set[str]()
    while len(tried) < 400:
        pattern = "".join(rng.choice([*"ab.()|*+?^$", "[^a]", "{1,2}", "{2}"]) for _ in range(7))
        try:
            wanted, found = re.compile(pattern), NamePattern(pattern)
        except (re.error, ValueError):
            continue
        tried.add(pattern)
        for name in ("", "a", "ab", "ba", "aab", "bbab", "abcabc"):
            assert found.matches(name) == bool(wanted.match(name)), (pattern, name)


@pytest.mark.parametrize("pattern", [".*" * 100 + "!", r"(\w?\.?)+!", "(a?)*" * 40 + "!"])
def test_patterns_on_which_re_hangs_are_answered(pattern: str) -> None:
    assert not NamePattern(pattern).matches("a" * 300)
    assert NamePattern(pattern).matches("a" * 300 + "!")


@pytest.mark.parametrize(
    "pattern",
    ["(", ")", "a)", "[", "[]", "*", "a**", "a*?", "(?i)a", "(?!a)b", "(?P<n>a)", r"\b", r"(a)\1"]
    + [
        "(a*)*",
        "((a{9}){9}){9}",
        r"(\w+\.?)+",
        "a{2",
        "{",
        "a\\",
        "[z-a]",
        "a" * (MAX_CHARACTERS + 1),
        "(" * 128 + ")" * 127,
    ],
)
def test_what_is_not_read_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError):
        NamePattern(pattern)


def test_groups_nest_as_deep_as_a_pattern_is_long() -> None:
    assert NamePattern("(" * 127 + "a" + ")" * 127).matches("ab")
