"""The process never grows beyond the budget that it was given."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from moe_tool.models.locate import LocatedModel
from tests.packed import pack_bundle
from tests.tiny_models import tiny_tokenizer

_RUN = """
import json, sys
from pathlib import Path
from moe_tool.runtime.decoding_config import GenerateOptions
from moe_tool.runtime.generation import run_prompt
from moe_tool.runtime.run_options import run_options
folder, memory, n_prompt, max_tokens = sys.argv[1:]
result = run_prompt(
    Path(folder),
    "word " * (int(n_prompt) // 5),
    options=run_options(memory=memory),
    generation=GenerateOptions(max_tokens=int(max_tokens), ignore_eos=True),
)
found = {
    "generated_tokens": result.generated_tokens,
    "peak_rss_bytes": result.peak_rss_bytes,
    "memory_budget_bytes": result.setup.memory_budget_bytes,
}
print(json.dumps(found))
"""


def _run(bundle: Path, memory: str, *, n_prompt: int, max_tokens: int) -> dict[str, Any]:
    command = [sys.executable, "-c", _RUN, str(bundle), memory, str(n_prompt), str(max_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 layers of 8 experts, 201 MiB of experts in bfloat16, a vocabulary of 32768."""
    folder = tmp_path_factory.mktemp("larger")
    config = MixtralConfig(
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_local_experts=8,
        vocab_size=32768,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    model = LocatedModel(folder=folder / "model", name="larger")
    pack_bundle(model, out=folder / "bundle", bits="native")
    return folder / "bundle"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("memory", "n_prompt", "max_tokens"),
    [("min", 20, 16), ("min", 1200, 16), ("50%", 300, 300), ("100%", 20, 64)],
)
def test_the_peak_stays_within_the_budget(
    bundle: Path, memory: str, n_prompt: int, max_tokens: int
) -> None:
    result = _run(bundle, memory, n_prompt=n_prompt, max_tokens=max_tokens)
    assert result["generated_tokens"] == max_tokens
    assert result["peak_rss_bytes"] <= result["memory_budget_bytes"]


@pytest.mark.slow
def test_it_holds_for_a_tiny_model_too(tiny_bundle: Callable[..., Path]) -> None:
    result = _run(tiny_bundle("deepseek_v3"), "min", n_prompt=100, max_tokens=100)
    assert result["peak_rss_bytes"] <= result["memory_budget_bytes"]


@pytest.mark.slow
def test_what_a_far_too_small_budget_is_told_is_near_the_least_that_works(
    tiny_bundle: Callable[..., Path],
) -> None:
    bundle = tiny_bundle("mixtral")
    least = _run(bundle, "min", n_prompt=20, max_tokens=2)["memory_budget_bytes"]
    command = [sys.executable, "-c", _RUN, str(bundle), "1MiB", "20", "2"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    needed = re.findall(r"needs .*? \((\d+) bytes\)", refused.stderr)[-1]
    assert least <= int(needed) + 2 * 2**20  # processes differ a little from start to start
    assert int(needed) <= least + 12 * 2**20
    hint = re.findall(r"hint: --memory ([\d.]+MiB)", refused.stderr)[-1]
    assert _run(bundle, hint, n_prompt=20, max_tokens=2)["generated_tokens"] == 2
