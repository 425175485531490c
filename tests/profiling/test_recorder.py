"""A profile says what the model did: routing, resumption, one read of everything, files or memory
alike."""

import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moe_tool.artifacts.expert_statistics import ExpertStatistics
from moe_tool.budget.sizes import parse_bytes
from moe_tool.errors import BudgetError, UsageError
from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.models.locate import LocatedModel
from moe_tool.models.model_config import config_from_json, read_config
from moe_tool.models.moe_layers import find_moe_layers
from moe_tool.profiling import profile_pass
from moe_tool.profiling.hidden_states import HiddenStates
from moe_tool.profiling.layer_statistics import MAX_PRICED_TOKENS
from moe_tool.profiling.recorder import ProfileReport, record_profile
from moe_tool.text.sources import parse_sources
from tests.tiny_models import TINY


def record(folder: Path, out: Path, **options: object) -> ProfileReport:
    arguments: dict[str, object] = {"tokens": 512, "seq_len": 32, "memory_bytes": 8 * 2**30}
    return record_profile(
        LocatedModel(folder=folder, name="tiny"),
        parse_sources(["builtin"]),
        out=out,
        **(arguments | options),  # type: ignore[arg-type]
    )


def recomputed_routing(folder: Path, ids: np.ndarray) -> dict[int, list[torch.Tensor]]:
    """What transformers' own forward of all sequences at once routes: layer -> [index, weight,
    logits]."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    seen: dict[int, list[torch.Tensor]] = {}
    for modules in find_moe_layers(model):

        def hook(module, arguments, output, modules=modules):  # type: ignore[no-untyped-def]
            routed = modules.read_output(output)
            seen[modules.layer] = [routed.index, routed.weight, routed.logits]

        modules.router.register_forward_hook(hook)
    with torch.no_grad():
        model(input_ids=torch.from_numpy(ids.astype(np.int64)), use_cache=False)
    return seen


@pytest.mark.parametrize("arch", sorted(TINY))
def test_recorded_routing_equals_recomputed_routing(
    arch: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_checkpoint(arch)
    report = record(folder, tmp_path / "p.h5")
    assert (
        report.bytes_read <= 1.02 * report.checkpoint_bytes + 2**14
    )  # routers and norms, for the identity
    with ProfileReader.open(tmp_path / "p.h5") as profile:
        wanted = recomputed_routing(folder, profile.tokens.ids)
        assert set(wanted) == set(profile.layers)
        for layer in profile.layers:
            trace = profile.trace(layer)
            index, weight, logits = wanted[layer]
            assert np.array_equal(np.sort(trace.top_k_index, 1), np.sort(index.numpy(), 1))
            assert np.abs(trace.router_logits - logits.numpy()).max() < 2e-3 * float(
                logits.abs().max()
            )
            order = np.argsort(trace.top_k_index, 1)
            same = np.argsort(index.numpy(), 1)
            recorded = np.take_along_axis(trace.top_k_weight.astype(np.float32), order, 1)
            assert np.allclose(recorded, np.take_along_axis(weight.numpy(), same, 1), atol=2e-3)
            if trace.selection_score is not None:  # the scores choose what the router chose
                k = trace.top_k_index.shape[1]
                chosen = np.argsort(-trace.selection_score.astype(np.float32), 1)[:, :k]
                agreed = (np.sort(chosen, 1) == np.sort(trace.top_k_index, 1)).all(1).mean()
                assert agreed > 0.97  # float16 ties


def test_statistics_are_finite_counted_and_split(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    report = record(tiny_checkpoint("qwen3_moe"), tmp_path / "p.h5", tokens=1024)
    with ProfileReader.open(tmp_path / "p.h5") as profile:
        shape, tokens = profile.header.shape, profile.tokens
        n_held_out = int(tokens.held_out.sum()) * tokens.ids.shape[1]
        assert report.tokens == tokens.ids.size == 1024
        assert n_held_out == 256
        for position, layer in enumerate(profile.layers):
            found = profile.statistics(layer)
            trace = profile.trace(layer)
            assert found.in_sample.n_tokens == 1024 - n_held_out
            assert found.held_out.n_tokens == n_held_out
            assert found.in_sample.load.sum() == (1024 - n_held_out) * shape.top_k
            assert found.probe.n_sampled + found.probe_held_out.n_sampled == 1024
            assert (found.eps_bits_n_tokens <= MAX_PRICED_TOKENS).all()
            assert (np.diff(found.eps_bits, axis=1) > 0).all()  # fewer bits cost more
            assert found.sensitivity > 0 and found.sensitivity_n_tokens > 0
            assert trace.next_gate_index.shape[0] == min(3, len(profile.layers) - 1 - position)
            for field in fields(ExpertStatistics):
                value = getattr(found, field.name)
                if isinstance(value, np.ndarray):
                    assert np.isfinite(value).all()


def test_next_gate_is_the_next_router_on_this_layers_input(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_checkpoint("mixtral")
    record(folder, tmp_path / "p.h5")
    with ProfileReader.open(tmp_path / "p.h5") as profile:
        ids, recorded = profile.tokens.ids, profile.trace(0).next_gate_index
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs: list[torch.Tensor] = []
    layers = find_moe_layers(model)
    layers[0].router.register_forward_hook(lambda module, a, o: inputs.append(a[0]))
    with torch.no_grad():
        model(input_ids=torch.from_numpy(ids.astype(np.int64)), use_cache=False)
        for depth in (1, 2):
            wanted = layers[depth].route(inputs[0]).index.numpy()
            agreed = np.sort(recorded[depth - 1], 1) == np.sort(wanted, 1)
            assert agreed.all(1).mean() > 0.99


class Killed(BaseException):
    """Not an Exception: nothing on the way may catch it, as nothing catches SIGKILL."""


@pytest.mark.parametrize("after_commits", [1, 2, 3])
@pytest.mark.parametrize("in_memory", [True, False])
def test_resumed_profile_equals_the_uninterrupted_one(
    after_commits: int,
    in_memory: bool,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tiny_checkpoint("olmoe")
    if not in_memory:
        keep_in_files(monkeypatch)
    record(folder, tmp_path / "whole.h5")
    commits = 0
    commit = HiddenStates.commit

    def killing(self: HiddenStates, next_layer: int) -> None:
        nonlocal commits
        if commits == after_commits:
            raise Killed
        commits += 1
        commit(self, next_layer)

    monkeypatch.setattr(HiddenStates, "commit", killing)
    with pytest.raises(Killed):
        record(folder, tmp_path / "killed.h5")
    assert not (tmp_path / "killed.h5").exists()
    monkeypatch.setattr(HiddenStates, "commit", commit)
    report = record(folder, tmp_path / "killed.h5", resume=True)
    assert report.resumed_at_layer == (after_commits - 1 or None)
    assert (tmp_path / "killed.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()
    assert not (tmp_path / "killed.h5.parts").exists()


def keep_in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = profile_pass.plan_profile_memory
    monkeypatch.setattr(
        profile_pass,
        "plan_profile_memory",
        lambda *a, **k: replace(plan(*a, **k), hidden_in_memory=False),
    )


def test_hidden_states_in_files_give_the_same_profile(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tiny_checkpoint("mixtral"), tmp_path / "memory.h5")
    keep_in_files(monkeypatch)
    record(tiny_checkpoint("mixtral"), tmp_path / "files.h5")
    assert (tmp_path / "memory.h5").read_bytes() == (tmp_path / "files.h5").read_bytes()


def test_torn_hidden_states_are_computed_again(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint("mixtral")
    record(folder, tmp_path / "whole.h5")
    monkeypatch.setattr(profile_pass, "write_profile", raise_killed)
    with pytest.raises(Killed):
        record(folder, tmp_path / "killed.h5")
    monkeypatch.undo()
    for name in ("hidden-a.bin", "hidden-b.bin"):
        path = tmp_path / "killed.h5.parts" / name
        data = bytearray(path.read_bytes())
        data[100] ^= 1
        path.write_bytes(data)
    assert record(folder, tmp_path / "killed.h5", resume=True).resumed_at_layer is None
    assert (tmp_path / "killed.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


def raise_killed(*arguments: object, **options: object) -> None:
    raise Killed


def test_resume_with_another_seed_is_refused(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint("mixtral")
    monkeypatch.setattr(profile_pass, "write_profile", raise_killed)
    with pytest.raises(Killed):
        record(folder, tmp_path / "p.h5")
    with pytest.raises(UsageError, match="another model, text, seed"):
        record(folder, tmp_path / "p.h5", resume=True, seed=1)


def test_a_foreign_folder_in_the_way_is_left_alone(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "p.h5.parts").mkdir()
    (tmp_path / "p.h5.parts" / "thesis").write_text("mine")
    with pytest.raises(UsageError, match="is in the way"):
        record(tiny_checkpoint("mixtral"), tmp_path / "p.h5")
    assert (tmp_path / "p.h5.parts" / "thesis").read_text() == "mine"


def test_a_folder_as_the_profile_is_refused_before_the_pass(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        record(tiny_checkpoint("mixtral"), tmp_path)


def test_too_small_budget_is_refused_with_one_that_works(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_checkpoint("mixtral")
    with pytest.raises(BudgetError, match="needs .* has 1.00 MiB") as refused:
        record(folder, tmp_path / "p.h5", memory_bytes=2**20)
    assert not (tmp_path / "p.h5").exists()
    assert refused.value.hint is not None
    nearest = parse_bytes(refused.value.hint.split("--memory ")[1])
    record(folder, tmp_path / "p.h5", memory_bytes=nearest)


def test_the_header_says_what_the_skeleton_is(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_checkpoint("granitemoe")
    record(folder, tmp_path / "p.h5")
    with ProfileReader.open(tmp_path / "p.h5") as reader:
        facts = reader.header.skeleton
    assert facts is not None
    stored = load_file(folder / "model.safetensors")
    # Its experts are stacked under block_sparse_moe.input_linear and output_linear.
    native = [
        tensor.nbytes for name, tensor in stored.items() if not re.search(r"(in|out)put_lin", name)
    ]
    assert facts.native_bytes == sum(native)
    assert config_from_json(facts.config_json).to_dict() == read_config(folder).to_dict()
