"""A tokenizer is read from its folder alone: none of the folder's code is run, nothing is asked."""

import ast
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_tool.errors import CorruptArtifactError, NotFoundError, UnsupportedModelError
from moe_tool.models.tokenizer import load_tokenizer
from tests.tiny_models import tiny_tokenizer

PACKAGE = Path(__file__).parent.parent.parent / "moe_tool"
# Without an explicit answer these ask a person on stdin, and run what the folder holds on "y".
ASKING = {"AutoTokenizer", "AutoModelForCausalLM", "AutoConfig", "AutoProcessor", "AutoModel"}


def with_code(folder: Path) -> Path:
    """Give a checkpoint's tokenizer a class of its own that leaves a mark when it is imported."""
    tiny_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    path.write_text(json.dumps(config))
    mark = folder / "CODE_RAN"
    (folder / "mine.py").write_text(
        f"open({str(mark)!r}, 'w').close()\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class Mine(PreTrainedTokenizerFast): pass\n"
    )
    return folder


@pytest.mark.parametrize("arch", [None, "deepseek_v3", "hunyuan_v1_moe", "gpt_oss"])
def test_code_of_a_tokenizer_is_never_run_whatever_is_answered(
    arch: str | None,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if arch is not None:
        shutil.copy(tiny_checkpoint(arch) / "config.json", tmp_path)
    folder = with_code(tmp_path)
    stdin = io.StringIO("y\n" * 10)
    monkeypatch.setattr("sys.stdin", stdin)
    with pytest.raises(UnsupportedModelError, match="needs Python code of its own") as caught:
        load_tokenizer(folder)
    assert not (folder / "CODE_RAN").exists()
    assert stdin.tell() == 0
    assert caught.value.exit_code == 3
    assert "trust_remote_code" not in str(caught.value)


def test_the_hint_about_code_helps_when_followed(tmp_path: Path) -> None:
    folder = with_code(tmp_path)
    with pytest.raises(UnsupportedModelError, match="auto_map out of tokenizer_config"):
        load_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["auto_map"]
    path.write_text(json.dumps(config))
    assert load_tokenizer(folder)("ab")["input_ids"] == tiny_tokenizer()("ab")["input_ids"]
    assert not (folder / "CODE_RAN").exists()


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=str(tmp_path)):
        load_tokenizer(tmp_path)


def test_leftovers_in_config_json_do_not_keep_a_tokenizer_from_being_read(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint("mixtral"), tmp_path / "m"))
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config |= {"output_attentions": True, "attn_implementation": "flash_attention_2"}
    path.write_text(json.dumps(config))
    assert load_tokenizer(folder)("ab")["input_ids"] == tiny_tokenizer()("ab")["input_ids"]


def calls_that_leave_code_open(source: str) -> list[int]:
    """Return the lines of calls that do not refuse a folder's code by name."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner = node.func.value
        if not (isinstance(owner, ast.Name) and owner.id in ASKING):
            continue
        if node.func.attr == "register":  # is given classes, reads no folder
            continue
        answers = [each.value for each in node.keywords if each.arg == "trust_remote_code"]
        if not any(isinstance(each, ast.Constant) and each.value is False for each in answers):
            lines.append(node.lineno)
    return lines


def test_no_call_of_the_package_leaves_code_open() -> None:
    found = {
        str(path.relative_to(PACKAGE)): lines
        for path in sorted(PACKAGE.rglob("*.py"))
        if (lines := calls_that_leave_code_open(path.read_text(encoding="utf-8")))
    }
    assert found == {}
    assert calls_that_leave_code_open("x = AutoTokenizer.from_pretrained(f)\n") == [1]
    assert calls_that_leave_code_open("AutoConfig.for_model(f, trust_remote_code=False)\n") == []


def test_settings_of_wrong_types_are_found_before_text_is_encoded(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": "x"}))
    with pytest.raises(CorruptArtifactError, match="tokenizer in .* cannot be read"):
        load_tokenizer(tmp_path)
