"""Processes with a large embedding table never hold it: packing, profiling, and runs by row."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_tool.errors import CorruptArtifactError
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.models.locate import LocatedModel
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import open_session
from tests.packed import pack_bundle
from tests.tiny_models import tiny_tokenizer
from tests.zoo.text_models import TEXT_MODELS

_ROWS, _WIDTH, _LAYERS = 16384, 1024, 4
_STORED_BYTES = _ROWS * _WIDTH * _LAYERS * 2
"""Size of the table per layer: 128 MiB of bfloat16, twice as much in memory"""
_MIB = 2**20
_PACK = """
import json, sys
from pathlib import Path
from moe_tool.models.locate import LocatedModel
from tests.packed import pack_bundle
model, out, rows = sys.argv[1:]
report = pack_bundle(LocatedModel(folder=Path(model), name="m"), out=Path(out), rows=rows)
print(json.dumps({"peak": report.peak_rss_bytes}))
"""
_PROFILE = """
import json, sys
from moe_tool.available_memory import peak_rss_bytes
from moe_tool.cli.app import app
model, text, out = sys.argv[1:]
app(["profile", model, "--data", text, "--tokens", "64", "--seq-len", "32", "--out", out],
    standalone_mode=False)
print(json.dumps({"peak": peak_rss_bytes()}))
"""
_RUN = """
import json, sys
from pathlib import Path
from moe_tool.runtime.decoding_config import GenerateOptions
from moe_tool.runtime.generation import run_prompt
from moe_tool.runtime.run_options import run_options
result = run_prompt(
    Path(sys.argv[1]),
    "the list of words",
    options=run_options(memory="min", threads=1, context=64, rows=sys.argv[2]),
    generation=GenerateOptions(max_tokens=8, ignore_eos=True),
)
print(json.dumps({"peak": result.peak_rss_bytes, "text": result.text}))
"""


def _child(program: str, *words: object) -> dict[str, Any]:
    command = [sys.executable, "-c", program, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of Gemma 4's kind whose table per layer is all but nothing of it."""
    folder = tmp_path_factory.mktemp("tables") / "model"
    kind = TEXT_MODELS["gemma4_text"]
    config = kind.config("gemma4_text")
    config.vocab_size_per_layer_input = _ROWS
    config.hidden_size_per_layer_input = _WIDTH
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_damaged_block_is_refused_when_one_of_its_rows_is_read(
    model: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    pack_bundle(LocatedModel(folder=model, name="m"), out=bundle)
    with BundleReader.open(bundle) as reader, reader.open_skeleton() as skeleton:
        info = skeleton.tensors["model.embed_tokens_per_layer.weight"]
    row_bytes = _WIDTH * _LAYERS * 2
    options = run_options(memory="min", context=64, threads=1)
    for row, is_read in ((9000, False), (84, True)):
        with open(info.file, "r+b") as file:
            file.seek(info.offset + row * row_bytes)
            file.write(b"\x2a")
        with open_session(bundle, options) as session:
            assert session.plan.on_disk
            if is_read:
                with pytest.raises(CorruptArtifactError, match="is damaged: the hash of bytes"):
                    session.model(input_ids=torch.tensor([[row, 101, 32]]))
            else:
                session.model(input_ids=torch.tensor([[84, 101, 32]]))
    with pytest.raises(CorruptArtifactError, match="damaged"), BundleReader.open(bundle) as reader:
        reader.verify_all()


@pytest.mark.slow
def test_no_process_holds_the_table(model: Path, tmp_path: Path) -> None:
    whole = _child(_PACK, model, tmp_path / "whole", "none")["peak"]
    packed = _child(_PACK, model, tmp_path / "bundle", "auto")["peak"]
    assert whole - packed > _STORED_BYTES
    in_memory = _child(_RUN, tmp_path / "bundle", "none")
    on_disk = _child(_RUN, tmp_path / "bundle", "auto")
    assert on_disk["text"] == in_memory["text"]
    saved = in_memory["peak"] - on_disk["peak"]
    assert saved > 2 * _STORED_BYTES - 16 * _MIB
    (tmp_path / "text.txt").write_text("the list of words and more of them. " * 40)
    profiled = _child(_PROFILE, model, tmp_path / "text.txt", tmp_path / "p.h5")["peak"]
    assert profiled < on_disk["peak"] + _STORED_BYTES
