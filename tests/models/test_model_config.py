"""A configuration comes back from its copy in an artifact, and a forged copy is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_tool.errors import CorruptArtifactError, UnsupportedModelError
from moe_tool.models.architecture import open_model
from moe_tool.models.locate import LocatedModel
from moe_tool.models.meta_model import build_meta_model
from moe_tool.models.model_config import config_from_json, read_config, read_config_text
from moe_tool.runtime.working_set import Workload, buffer_bytes, kv_cache_bytes
from tests.tiny_models import TINY

WORKLOADS = (
    Workload(batch=1, positions=200, prompt_tokens=100),
    Workload(batch=3, positions=64, prompt_tokens=1),
)


@pytest.mark.parametrize("arch", TINY)
def test_a_plan_needs_no_folder(arch: str, tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint(arch)
    wanted = read_config(folder).get_text_config()
    found = config_from_json(read_config_text(folder))
    assert type(found) is type(wanted) and found.to_dict() == wanted.to_dict()
    opened = open_model(LocatedModel(folder=folder, name="tiny"))
    opened.checkpoint.close()
    for workload in WORKLOADS:
        assert kv_cache_bytes(found, workload) == kv_cache_bytes(wanted, workload) > 0
        assert buffer_bytes(found, opened.shape, workload) == buffer_bytes(
            wanted, opened.shape, workload
        )


def test_labels_and_code_are_not_copied(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    raw = json.loads((tiny_checkpoint("mixtral") / "config.json").read_text())
    raw |= {"id2label": {"0": "x"}, "auto_map": {"AutoConfig": "evil.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    text = read_config_text(tmp_path)
    assert "evil" not in text and "id2label" not in text and "\n" not in text


LEFTOVERS = {
    "return_dict": False,
    "use_cache": False,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_router_logits": True,
    "torchscript": True,
    "attn_implementation": "flash_attention_2",
    "_attn_implementation": "flash_attention_2",
    "_attn_implementation_autoset": True,
    "_experts_implementation": "grouped_mm",
}


@pytest.mark.parametrize("nested", [False, True])
def test_what_other_runs_left_over_changes_nothing(
    nested: bool, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_checkpoint("mixtral")
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"part": LEFTOVERS, "kept": 1} if nested else LEFTOVERS
    (tmp_path / "config.json").write_text(json.dumps(raw))
    text = read_config_text(tmp_path)
    assert not [name for name in LEFTOVERS if f'"{name}"' in text]
    config = read_config(tmp_path)
    wanted = read_config(folder)
    assert config.return_dict and config.use_cache
    assert config._attn_implementation == wanted._attn_implementation
    assert build_meta_model(tmp_path).config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", CorruptArtifactError),
        ("[]", CorruptArtifactError),
        ("[" * 10**5, CorruptArtifactError),
        ('{"model_type": 3}', CorruptArtifactError),
        ('{"model_type": "mixtral", "model_type": "mixtral"}', CorruptArtifactError),
        ('{"model_type": "mixtral", "rms_norm_eps": NaN}', CorruptArtifactError),
        ('{"model_type": "mixtral", "num_hidden_layers": 1000000000}', CorruptArtifactError),
        ('{"model_type": "mixtral", "num_hidden_layers": 0}', CorruptArtifactError),
        ('{"model_type": "mixtral", "hidden_size": -64}', CorruptArtifactError),
        ('{"model_type": "mixtral", "num_attention_heads": true}', CorruptArtifactError),
        ('{"model_type": "mixtral", "vocab_size": 1000000000000}', CorruptArtifactError),
        ('{"model_type": "mixtral", "hidden_size": "64"}', CorruptArtifactError),
        ('{"model_type": "no_such", "auto_map": {"AutoConfig": "a.B"}}', UnsupportedModelError),
        ('{"model_type": "bert_japanese_none"}', UnsupportedModelError),
        (
            '{"model_type": "mixtral", "quantization_config": {"quant_method": "no-such"}}',
            UnsupportedModelError,
        ),
    ],
)
def test_a_forged_copy_is_refused(text: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        config_from_json(text, Path("p.h5"))


def test_the_artifact_is_named_and_so_is_the_way_out() -> None:
    with pytest.raises(CorruptArtifactError, match=r"p\.h5: hidden_size is -1") as raised:
        config_from_json('{"model_type": "mixtral", "hidden_size": -1}', Path("p.h5"))
    assert raised.value.hint is not None and "moe-tool profile" in raised.value.hint
