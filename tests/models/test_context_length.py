"""The longest sequence of a model: as stated, or as its rotary embedding was stretched to."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_tool.models.architecture import open_model
from moe_tool.models.context_length import context_length
from moe_tool.models.locate import LocatedModel
from moe_tool.models.model_config import read_config
from tests.tiny_models import TINY


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({}, None),
        ({"max_position_embeddings": 64}, 64),
        ({"max_position_embeddings": 64, "rope_scaling": None}, 64),
        # as a model card has it: 4 x 32768 beside the old number
        (
            {
                "max_position_embeddings": 40960,
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32768,
                },
            },
            131072,
        ),
        # raised already, as DeepSeek-V3 is published: 40 x 4096
        (
            {
                "max_position_embeddings": 163840,
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 40,
                    "original_max_position_embeddings": 4096,
                },
            },
            163840,
        ),
        (
            {
                "max_position_embeddings": 64,
                "rope_parameters": {"rope_type": "linear", "factor": 2},
            },
            128,
        ),
        # the lengthened positions of Phi-3.5-MoE: 8 x 32 is what is stated
        (
            {
                "max_position_embeddings": 256,
                "original_max_position_embeddings": 32,
                "rope_parameters": {"rope_type": "longrope", "factor": 8.0},
            },
            256,
        ),
        (
            {
                "max_position_embeddings": 64,
                "rope_parameters": {
                    "full_attention": {"rope_type": "yarn", "factor": 4.0},
                    "sliding_attention": {"rope_type": "default"},
                },
            },
            256,
        ),
        (
            {"max_position_embeddings": 64, "rope_scaling": {"rope_type": "dynamic", "factor": 4}},
            64,
        ),
        ({"max_position_embeddings": 64, "rope_scaling": {"rope_type": "yarn"}}, 64),
        (
            {
                "max_position_embeddings": 64,
                "rope_scaling": {"rope_type": "yarn", "factor": float("inf")},
            },
            64,
        ),
        ({"max_position_embeddings": "many", "rope_scaling": ["yarn"]}, None),
    ],
)
def test_the_larger_of_stated_and_stretched_positions(
    config: dict[str, Any], wanted: int | None
) -> None:
    assert context_length(config) == wanted


def test_config_json_and_what_transformers_makes_of_it_agree(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint("qwen3_moe"), tmp_path / "m"))
    raw = json.loads((folder / "config.json").read_text())
    raw.pop("rope_parameters")
    raw |= {
        "max_position_embeddings": 64,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    }
    (folder / "config.json").write_text(json.dumps(raw))
    assert context_length(raw) == context_length(read_config(folder)) == 256
    opened = open_model(LocatedModel(folder=folder, name="m"))
    with opened.checkpoint:
        assert opened.max_positions == 256


@pytest.mark.parametrize("arch", TINY)
def test_no_tiny_model_is_longer_than_it_says(arch: str) -> None:
    assert context_length(TINY[arch]()) == 256
