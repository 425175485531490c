"""What is followed of generation_config.json, what is passed over, what is refused."""

import json
from pathlib import Path

import pytest

from moe_tool.errors import CorruptArtifactError
from moe_tool.models.generation_settings import read_generation_settings


def write(folder: Path, settings: object) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def test_without_a_file_there_are_no_settings(tmp_path: Path) -> None:
    assert read_generation_settings(tmp_path) is None


@pytest.mark.parametrize(
    "unknown",
    [
        # transformers itself cannot build these
        {"watermarking_config": {"x": 1}},
        {"compile_config": {"a": 1}},
        {"cache_implementation": "nope"},
        {"mine": {"nested": [1]}},
        {"_from_model_config": True, "transformers_version": "4.0"},
    ],
)
def test_objects_that_are_not_followed_are_passed_over(
    unknown: dict[str, object], tmp_path: Path
) -> None:
    found = read_generation_settings(write(tmp_path, {"top_k": 7, "top_p": 1, **unknown}))
    assert found is not None
    assert (found.top_k, found.top_p) == (7, 1.0)
    assert not set(unknown) & {name for name, value in vars(found).items() if value == 1}


def test_an_empty_list_names_nothing(tmp_path: Path) -> None:
    found = read_generation_settings(write(tmp_path, {"eos_token_id": [], "bad_words_ids": []}))
    assert found is not None
    assert found.eos_token_id is None and found.bad_words_ids is None


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"top_k": "many"}, "sets top_k to 'many'"),
        ({"repetition_penalty": 0}, "sets repetition_penalty to '0'"),
        ({"eos_token_id": {"a": 1}}, "sets eos_token_id"),
        ({"suppress_tokens": [-3]}, "sets suppress_tokens"),
        ({"bad_words_ids": [[]]}, "sets bad_words_ids"),
        ([], "not an object"),
    ],
)
def test_a_followed_setting_that_means_nothing_is_named(
    settings: object, says: str, tmp_path: Path
) -> None:
    with pytest.raises(CorruptArtifactError, match=says) as caught:
        read_generation_settings(write(tmp_path, settings))
    assert "generation_config.json" in caught.value.message
