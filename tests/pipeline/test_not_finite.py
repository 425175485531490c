"""Weights and predictions that are not finite: refused by name, never turned into text."""

import importlib.util
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_tool.benchmarking.bench import bench
from moe_tool.benchmarking.bench_plan import BenchOptions
from moe_tool.budget.request import parse_memory
from moe_tool.errors import CorruptArtifactError
from moe_tool.evaluation.eval_harness import run_harness
from moe_tool.evaluation.evaluate import EvaluateOptions, evaluate
from moe_tool.evaluation.harness_tasks import HarnessOptions
from moe_tool.models.locate import LocatedModel
from moe_tool.packing import write_bundle
from moe_tool.profiling.recorder import record_profile
from moe_tool.runtime.decoding_config import GenerateOptions
from moe_tool.runtime.generation import run_prompt
from moe_tool.runtime.run_options import run_options
from moe_tool.text.sources import parse_sources
from moe_tool.tuning.tune_pruning import TunePruningOptions, tune_pruning
from tests.evaluation.small_tasks import write_tasks
from tests.packed import pack_bundle

EXPERT = "model.layers.1.block_sparse_moe.experts.5.w2.weight"
MATRIX = "model.layers.1.self_attn.o_proj.weight"
NORM = "model.layers.1.post_attention_layernorm.weight"
ROUTER = "model.layers.2.block_sparse_moe.gate.weight"


@pytest.fixture
def changed(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., LocatedModel]:
    """Return (name, change) -> a mixtral with one tensor changed in place."""

    def make(name: str, change: Callable[[torch.Tensor], object]) -> LocatedModel:
        folder = tmp_path / "model"
        shutil.copytree(tiny_checkpoint("mixtral", "bfloat16"), folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors[name])
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return LocatedModel(folder=folder, name="broken")

    return make


def break_one(value: float) -> Callable[[torch.Tensor], object]:
    return lambda tensor: tensor.view(-1).__setitem__(3, value)


@pytest.mark.parametrize("name", [EXPERT, MATRIX, NORM, ROUTER, "lm_head.weight"])
@pytest.mark.parametrize("options", [{}, {"skeleton_bits": "4"}, {"bits": "4"}])
def test_pack_names_the_tensor_whatever_it_is_packed_as(
    name: str,
    options: dict[str, str],
    changed: Callable[..., LocatedModel],
    tmp_path: Path,
) -> None:
    model = changed(name, break_one(float("nan") if options else float("-inf")))
    with pytest.raises(CorruptArtifactError, match=f"'{name}' holds NaN or infinity") as caught:
        pack_bundle(model, out=tmp_path / "bundle", **options)  # type: ignore[arg-type]
    assert caught.value.exit_code == 3
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("name", [EXPERT, MATRIX, NORM])
def test_profile_names_the_tensor_and_blames_no_expert(
    name: str, changed: Callable[..., LocatedModel], tmp_path: Path
) -> None:
    model = changed(name, break_one(float("nan")))
    with pytest.raises(CorruptArtifactError, match=f"'{name}' holds NaN or infinity"):
        record_profile(
            model, parse_sources(["builtin"]), out=tmp_path / "p.h5", tokens=512, seq_len=32
        )


def overflow(tensor: torch.Tensor) -> None:
    """Every number is finite; products with them are not."""
    tensor.fill_(3e38)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (MATRIX, "layer 1 gives hidden states that are not finite"),
        ("lm_head.weight", "the head gives logits that are not finite"),
        ("model.norm.weight", "the head gives logits that are not finite"),
    ],
)
def test_profile_names_the_place_that_overflows(
    name: str, says: str, changed: Callable[..., LocatedModel], tmp_path: Path
) -> None:
    model = changed(name, overflow)
    with pytest.raises(CorruptArtifactError, match=says):
        record_profile(
            model, parse_sources(["builtin"]), out=tmp_path / "p.h5", tokens=512, seq_len=32
        )


@pytest.fixture
def overflowing(
    changed: Callable[..., LocatedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Return a bundle as a pack without a proof would leave it."""
    monkeypatch.setattr(write_bundle, "prove_bundle", lambda *_, **__: None)
    pack_bundle(changed(MATRIX, overflow), out=tmp_path / "bundle")
    return tmp_path / "bundle"


def test_no_text_comes_of_logits_that_are_not_finite(overflowing: Path) -> None:
    pieces: list[str] = []
    with pytest.raises(CorruptArtifactError, match="logits that are not finite") as caught:
        run_prompt(
            overflowing,
            "The list",
            options=run_options(memory="50%"),
            generation=GenerateOptions(max_tokens=4, ignore_eos=True),
            on_text=pieces.append,
        )
    assert pieces == []
    assert caught.value.hint is not None and f"inspect {overflowing} --verify" in caught.value.hint


def test_no_figure_comes_of_logits_that_are_not_finite(overflowing: Path, tmp_path: Path) -> None:
    memory, text = parse_memory("50%"), parse_sources(["builtin"])
    refused = partial(pytest.raises, CorruptArtifactError, match="logits that are not finite")
    with refused():
        evaluate(overflowing, text, EvaluateOptions(tokens=64, seq_len=16, memory=memory))
    with refused():
        bench(overflowing, BenchOptions(prompt_tokens=(8,), generate=(2,), memory=(memory,)))
    with refused():
        tune_pruning(overflowing, text, TunePruningOptions(tokens=64, seq_len=16, memory=memory))
    if importlib.util.find_spec("lm_eval") is not None:
        with refused():
            run_harness(
                overflowing,
                run_options(memory="50%", gates=False),
                HarnessOptions(tasks=(str(write_tasks(tmp_path)),), offline=True),
            )
