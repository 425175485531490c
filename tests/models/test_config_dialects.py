"""Spellings of config.json are read as transformers reads them, and survive in a bundle's copy."""

import json
import math
from pathlib import Path

import pytest
from transformers import AutoConfig, DeepseekV3Config, GraniteMoeHybridConfig

from moe_tool.models.config_dialects import encode_floats, plain_config
from moe_tool.models.model_config import config_from_json, read_config, read_config_text

SPELLINGS = {
    "bare": "Infinity",
    "tagged": '{"__float__": "Infinity"}',
    "overflowing": "1e999",
}


def write_hybrid(folder: Path, spelling: str) -> None:
    raw = GraniteMoeHybridConfig(num_hidden_layers=2, layer_types=["mamba", "attention"]).to_dict()
    text = json.dumps(raw | {"time_step_limit": [0.0, "HERE"]}, default=str)
    (folder / "config.json").write_text(text.replace('"HERE"', spelling))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_infinity_is_read_as_transformers_reads_it(spelling: str, tmp_path: Path) -> None:
    write_hybrid(tmp_path, SPELLINGS[spelling])
    wanted = AutoConfig.from_pretrained(tmp_path).time_step_limit
    assert list(read_config(tmp_path).time_step_limit) == list(wanted) == [0.0, math.inf]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_copy_is_strict_json_and_gives_the_same_configuration(
    spelling: str, tmp_path: Path
) -> None:
    write_hybrid(tmp_path, SPELLINGS[spelling])
    text = read_config_text(tmp_path)
    assert "Infinity" in text and "Infinity]" not in text
    assert config_from_json(text).to_dict() == read_config(tmp_path).to_dict()


def test_every_float_that_json_lacks_comes_back() -> None:
    value = {"a": [math.inf, {"b": -math.inf}], "c": 1.5, "d": None}
    assert plain_config(json.loads(json.dumps(encode_floats(value), allow_nan=False))) == value
    found = plain_config(json.loads(json.dumps(encode_floats({"n": math.nan}), allow_nan=False)))
    assert math.isnan(found["n"])


def test_an_object_of_another_kind_stays() -> None:
    value = {"a": {"__float__": "many"}, "b": {"__float__": "NaN", "more": 1}}
    assert plain_config(value) == value


def test_kimi_k2_is_deepseek_v3_wherever_it_is_named(tmp_path: Path) -> None:
    raw = DeepseekV3Config().to_dict() | {"model_type": "kimi_k2"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert type(read_config(tmp_path)) is DeepseekV3Config
    nested = plain_config({"model_type": "kimi_k25", "text_config": {"model_type": "kimi_k2"}})
    assert nested["text_config"]["model_type"] == "deepseek_v3"


def test_the_thinker_stands_for_an_omni_model() -> None:
    raw = {"model_type": "qwen3_omni_moe", "talker_config": {}, "thinker_config": {"a": 1}}
    assert plain_config(raw) == {"a": 1, "model_type": "qwen3_omni_moe_thinker"}
