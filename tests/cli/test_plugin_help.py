"""What --help and refusals say of plug-ins: every name in them can be typed."""

import re

import pytest

from moe_tool.cli.app import run_command
from moe_tool.errors import UsageError
from moe_tool.policies.misses import MISS_POLICIES, parse_miss_policy

PRESETS = [f"{name}:{each}" for name, spec in MISS_POLICIES.items() for each in spec.presets]


def test_there_are_presets():
    assert "buddy:published" in PRESETS


@pytest.mark.parametrize("verb", ["run", "evaluate", "eval-harness", "bench"])
@pytest.mark.parametrize("preset", PRESETS)
def test_help_lists_presets_with_their_values(
    verb: str, preset: str, capsys: pytest.CaptureFixture[str]
):
    assert run_command([verb, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    kind, _, name = preset.partition(":")
    words = ", ".join(MISS_POLICIES[kind].preset_words(name))
    assert f"{preset} as {kind}, with {words}" in re.sub(r"(?<=\w)- (?=\w)", "-", shown)
    assert parse_miss_policy(f"{kind}:{words.replace(', ', ',')}").name == (
        parse_miss_policy(preset).name
    )


def test_an_unknown_policy_names_every_policy_and_preset_there_is():
    with pytest.raises(UsageError) as refused:
        parse_miss_policy("magic")
    names = str(refused.value.hint).removeprefix("use one of ").split(", ")
    assert set(names) == {*MISS_POLICIES, *PRESETS}
    for name in names:
        parse_miss_policy(name)


def test_an_unknown_preset_names_the_presets_and_parameters():
    with pytest.raises(UsageError, match="'publish' is not known") as refused:
        parse_miss_policy("buddy:publish")
    values, _, presets = str(refused.value.hint).partition("; or one of the sets of values ")
    assert parse_miss_policy(presets) == parse_miss_policy("buddy:published")
    parse_miss_policy("buddy:" + values.removeprefix("it takes ").replace(", ", ","))


def test_a_policy_without_presets_does_not_mention_them():
    with pytest.raises(UsageError) as refused:
        parse_miss_policy("drop:published")
    assert "sets of values" not in str(refused.value.hint)
