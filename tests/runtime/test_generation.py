"""From a prompt to a result: text, counters, limits, and what an interruption keeps."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from transformers import GenerationConfig

from moe_tool.errors import BudgetError, CorruptArtifactError, UsageError
from moe_tool.models.tokenizer import load_tokenizer
from moe_tool.runtime.decoding_config import GenerateOptions
from moe_tool.runtime.generation import generate, generate_ids, run_prompt
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import Session, open_session

TinyBundle = Callable[..., Path]


@pytest.fixture(scope="module")
def session(tiny_bundle: TinyBundle) -> Iterator[Session]:
    with open_session(tiny_bundle("mixtral"), run_options(memory="50%", context=48)) as opened:
        yield opened


def test_the_pieces_of_text_add_up_to_the_result(session: Session) -> None:
    pieces: list[str] = []
    options = GenerateOptions(max_tokens=20, ignore_eos=True)
    result = generate(session, "The list", options, on_text=pieces.append)
    assert "".join(pieces) == result.text
    assert result.prompt.tokens == 8
    assert result.generated_tokens == len(result.token_ids) == 20
    assert result.setup.policy == "exact" and result.setup.residency == "cache"
    assert 0 < result.seconds_to_first_token < result.seconds
    assert result.tokens_per_second > 0
    assert result.decode.tokens == 19
    assert (
        result.decode.bytes_read
        == result.decode.misses * session.manifest.primaries[0].record_size_bytes
    )
    assert result.prompt.hits + result.prompt.misses > 0
    assert not result.interrupted
    assert result.stop_reason == "max_tokens"


def test_sampling_follows_its_seed(session: Session) -> None:
    def tokens(seed: int) -> tuple[int, ...]:
        options = GenerateOptions(max_tokens=12, temperature=1.0, seed=seed, ignore_eos=True)
        return generate(session, "The", options).token_ids

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


def test_generation_ends_where_the_context_does(session: Session) -> None:
    result = generate(session, "x" * 40, GenerateOptions(max_tokens=100, ignore_eos=True))
    assert result.generated_tokens == 8
    assert result.stop_reason == "context"


def test_a_prompt_that_fills_the_context_is_refused_with_both_numbers(session: Session) -> None:
    with pytest.raises(UsageError, match="48 tokens.*context of 48"):
        generate(session, "x" * 48, GenerateOptions())


@pytest.mark.parametrize(
    "options",
    [
        GenerateOptions(max_tokens=0),
        GenerateOptions(temperature=-1.0),
        GenerateOptions(temperature=float("nan")),
        GenerateOptions(temperature=1e-320),
    ],
)
def test_options_out_of_range_are_refused(session: Session, options: GenerateOptions) -> None:
    with pytest.raises(UsageError):
        generate(session, "x", options)


def test_an_empty_prompt_is_refused(session: Session) -> None:
    with pytest.raises(UsageError, match="empty"):
        generate(session, "", GenerateOptions())
    with pytest.raises(UsageError, match="no tokens"):
        generate_ids(session, [[]], GenerateOptions())


def test_more_prompts_than_planned_for_are_refused(session: Session) -> None:
    with pytest.raises(UsageError, match="2 prompts"):
        generate_ids(session, [[1], [2]], GenerateOptions())


def test_settings_that_decode_in_other_ways_are_not_followed(session: Session) -> None:
    plain = generate(session, "abc", GenerateOptions(max_tokens=6)).token_ids
    kept = session.model.generation_config
    session.model.generation_config = GenerationConfig(
        eos_token_id=kept.eos_token_id, penalty_alpha=0.6, dola_layers="high", num_beams=4
    )
    try:
        assert generate(session, "abc", GenerateOptions(max_tokens=6)).token_ids == plain
    finally:
        session.model.generation_config = kept


def test_an_end_of_text_token_ends_it(session: Session) -> None:
    options = GenerateOptions(max_tokens=20, ignore_eos=True)
    free = generate(session, "The list", options).token_ids
    own = session.model.generation_config.eos_token_id
    session.model.generation_config.eos_token_id = free[4]
    try:
        result = generate(session, "The list", GenerateOptions(max_tokens=20))
        assert result.token_ids == free[: free.index(free[4]) + 1]
        assert result.stop_reason == "end_of_text"
        assert generate(session, "The list", options).token_ids == free
    finally:
        session.model.generation_config.eos_token_id = own


def test_the_tokenizers_end_of_text_ends_it_too(session: Session) -> None:
    options = GenerateOptions(max_tokens=20, ignore_eos=True)
    free = generate(session, "The list", options).token_ids
    own, end = session.tokenizer.eos_token, session.tokenizer.convert_ids_to_tokens(free[4])
    session.tokenizer.eos_token = end
    try:
        result = generate(session, "The list", GenerateOptions(max_tokens=20))
        assert result.token_ids == free[: free.index(free[4]) + 1]
        assert generate(session, "The list", options).token_ids == free
    finally:
        session.tokenizer.eos_token = own


def test_an_empty_list_of_end_tokens_is_none_at_all(session: Session) -> None:
    own = session.model.generation_config.eos_token_id
    session.model.generation_config.eos_token_id = []
    session.tokenizer.pad_token = None
    try:
        result = generate(session, "The list", GenerateOptions(max_tokens=4))
        assert result.generated_tokens == 4 and result.stop_reason == "max_tokens"
    finally:
        session.model.generation_config.eos_token_id = own
        session.tokenizer.pad_token = "<pad>"


def test_the_chat_template_is_used_unless_raw(session: Session) -> None:
    session.tokenizer.chat_template = "<{{ messages[0]['content'] }}>"
    try:
        assert generate(session, "ab", GenerateOptions(max_tokens=1)).prompt.tokens == 4
        assert generate(session, "ab", GenerateOptions(max_tokens=1, raw=True)).prompt.tokens == 2
        session.tokenizer.chat_template = "{{ raise_exception('no') }}"
        with pytest.raises(UsageError, match="chat template"):
            generate(session, "ab", GenerateOptions(max_tokens=1))
    finally:
        session.tokenizer.chat_template = None


def test_ctrl_c_keeps_what_was_generated(session: Session) -> None:
    pieces: list[str] = []

    def interrupt(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    options = GenerateOptions(max_tokens=20, ignore_eos=True)
    whole = generate(session, "The list", options)
    result = generate(session, "The list", options, on_text=interrupt)
    assert result.interrupted and result.stop_reason == "interrupted"
    assert result.token_ids == whole.token_ids[: result.generated_tokens]
    assert 3 <= result.generated_tokens < 20
    assert generate(session, "The list", options).token_ids == whole.token_ids


def test_long_prompts_go_through_in_chunks(tiny_bundle: TinyBundle) -> None:
    """A session planned for short prompts takes long ones in pieces of that length."""
    prompt = [256] + [65, 66, 67] * 20
    greedy = GenerateOptions(max_tokens=16, ignore_eos=True)
    found = []
    for planned in (61, 16):
        options = run_options(memory="50%", context=96, prompt_tokens=planned)
        with open_session(tiny_bundle("gpt_oss"), options) as session:
            found.append(generate_ids(session, [prompt], greedy).token_ids)
            assert session.runner.stats.prompt.forwards == (1 if planned == 61 else 4)
            assert session.runner.stats.prompt.tokens == 61
    assert found[0] == found[1]


def test_run_prompt_plans_for_this_prompt_alone(tiny_bundle: TinyBundle) -> None:
    result = run_prompt(
        tiny_bundle("mixtral"),
        "The list",
        options=run_options(memory="min"),
        generation=GenerateOptions(max_tokens=5, ignore_eos=True),
    )
    assert result.generated_tokens == 5
    assert result.stop_reason == "max_tokens"
    assert result.setup.slots == 3


def test_a_run_says_which_end_tokens_it_adds(
    tiny_bundle: TinyBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    progress = Mock(note=notes.append)

    def with_another_end(folder: Path) -> Any:
        tokenizer = load_tokenizer(folder)
        tokenizer.eos_token = "<pad>"
        return tokenizer

    monkeypatch.setattr("moe_tool.runtime.generation.load_tokenizer", with_another_end)
    for ignore_eos in (True, False):
        run_prompt(
            tiny_bundle("mixtral"),
            "The list",
            options=run_options(memory="min"),
            generation=GenerateOptions(max_tokens=1, ignore_eos=ignore_eos),
            progress=progress,
        )
    assert [note for note in notes if "text ends" in note] == [
        "text ends also at <pad> (258), as the tokenizer says: the generation settings lack it"
    ]


def test_what_is_no_bundle_is_told_before_the_prompt_is_read(tmp_path: Path) -> None:
    with pytest.raises(CorruptArtifactError, match="is an empty folder, not a bundle"):
        run_prompt(tmp_path, "x", options=run_options(), generation=GenerateOptions())


def test_a_full_context_says_how_much_there_could_be(session: Session) -> None:
    with pytest.raises(UsageError) as caught:
        generate(session, "x" * 48, GenerateOptions())
    assert caught.value.hint == "a shorter prompt, or a larger --context, up to 256"


def test_too_small_a_budget_is_refused_with_one_that_works(tiny_bundle: TinyBundle) -> None:
    bundle = tiny_bundle("mixtral")
    with pytest.raises(BudgetError) as caught:
        open_session(bundle, run_options(memory="100MiB", context=32))
    assert caught.value.hint is not None
    suggestion = caught.value.hint.split()[1].rstrip(",")
    with open_session(bundle, run_options(memory=suggestion, context=32)) as session:
        assert session.plan.memory.n_slots >= 3


@pytest.mark.parametrize(
    "settings", [{"top_k": -1}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": -1.0}]
)
def test_a_range_that_cannot_be_sampled_from_is_off(
    session: Session, settings: dict[str, float]
) -> None:
    options = GenerateOptions(max_tokens=8, temperature=1.0, seed=1, ignore_eos=True)
    kept = session.model.generation_config
    found = []
    try:
        for given in ({"top_k": 260}, {"top_k": 260, **settings}):
            session.model.generation_config = GenerationConfig(**given)
            found.append(generate(session, "The", options).token_ids)
    finally:
        session.model.generation_config = kept
    assert found[0] == found[1]
