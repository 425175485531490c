"""Training finds what the gate weights do not say: which experts add nothing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_tool.budget.request import parse_memory
from moe_tool.cli.tune_pruning import _worth as worth
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.models.locate import LocatedModel
from moe_tool.models.skeleton import LayerCall
from moe_tool.progress import SILENT
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import open_session
from moe_tool.text.sources import parse_sources
from moe_tool.tuning import train_mask_router
from moe_tool.tuning.blend_routers import least_harmful
from moe_tool.tuning.judge_pruning import judge_pruning
from moe_tool.tuning.masked_experts import MaskedExperts
from moe_tool.tuning.train_mask_router import MaskTraining, ratio_routers
from moe_tool.tuning.tune_pruning import TunePruningOptions, TunePruningReport, tune_pruning
from tests.packed import pack_bundle
from tests.tiny_models import make_tiny_checkpoint

OPTIONS = TunePruningOptions(
    tokens=4096, seq_len=32, batch=4, threads=1, rate=0.2, memory=parse_memory("100%")
)
N_IDLE = 4
"""Experts of each layer, the first ones, whose output is next to nothing"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, half of whose experts add a fiftieth of what the others do."""
    folder = make_tiny_checkpoint("mixtral", tmp_path_factory.mktemp("idle"))
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        _, is_expert, rest = name.partition(".experts.")
        if is_expert and int(rest.partition(".")[0]) < N_IDLE and ".w2." in rest:
            weight.mul_(0.02)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    pack_bundle(LocatedModel(folder=folder, name="idle"), out=folder / "bundle", bits="native")
    return folder / "bundle"


def _tune(bundle: Path, seed: int) -> TunePruningReport:
    return tune_pruning(bundle, parse_sources(["builtin"]), replace(OPTIONS, seed=seed))


@pytest.mark.parametrize("seed", [0, 1])
def test_trained_routers_lose_far_less_than_the_gate_ratio_that_they_begin_with(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    trained = _tune(bundle, seed)
    monkeypatch.setattr(train_mask_router, "_LEARNING_RATE", 0.0)
    untrained = _tune(bundle, seed)
    assert trained.kept > 0 and trained.kept_to_start < 0.7
    for report in (trained, untrained):
        assert report.left_out == pytest.approx(0.2, abs=0.02)
    assert 0 < trained.kl.value < 0.6 * untrained.kl.value
    assert trained.kl.high < untrained.kl.low
    # The rule is no more than what training begins with, at the same text and rate.
    assert trained.kl_by_ratio == untrained.kl_by_ratio > 0.8 * untrained.kl.value
    assert trained.kl.value < 0.6 * trained.kl_by_ratio


def test_a_training_that_harms_is_not_kept(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Routers that learned to drop what the right ones keep."""
    train = MaskTraining.advance

    def advance(training: MaskTraining, *arguments: object, **named: object) -> None:
        train(training, *arguments, **named)  # type: ignore[arg-type]
        for router in training.routers.values():
            draw = torch.Generator().manual_seed(0)
            router.by_weight.data.copy_(-ratio_routers(training_shape)[0].by_weight)
            router.by_hidden.data.normal_(generator=draw)

    with BundleReader.open(bundle) as reader:
        training_shape = reader.manifest.shape
    monkeypatch.setattr(MaskTraining, "advance", advance)
    report = _tune(bundle, 0)
    assert (report.kept, report.kept_to_start) == (0, 1)
    with BundleReader.open(bundle) as reader:
        for layer, kept in reader.mask_router().items():
            start = ratio_routers(training_shape)[layer].to_arrays()
            np.testing.assert_array_equal(kept.by_hidden, 0)
            np.testing.assert_array_equal(kept.by_weight, start.by_weight)
    assert "was not kept" in worth(report)
    monkeypatch.undo()
    monkeypatch.setattr(train_mask_router, "_LEARNING_RATE", 0.0)
    assert report.kl == _tune(bundle, 0).kl


def test_what_harms_at_one_rate_is_passed_over() -> None:
    to_start = np.array([[1, 1, 1], [0.9, 0.9, 0.9], [0.5, 0.5, 1.01]])
    assert least_harmful(to_start) == 1
    assert least_harmful(to_start[[0, 2]]) == 0


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_the_rules_divergence_is_that_of_each_layers_lightest_slots(
    bundle: Path, share: float
) -> None:
    ids = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(3))
    options = run_options(
        memory="100%",
        policy="exact",
        residency="cache",
        context=16,
        prompt_tokens=16,
        batch=4,
        threads=1,
    )
    with open_session(bundle, options) as session:
        experts = MaskedExperts(session=session)
        session.skeleton.set_experts_function(experts)
        shape = session.manifest.shape
        verdict = judge_pruning(
            experts,
            ratio_routers(shape),
            shape,
            ids,
            share=share,
            micro_batch=2,
            progress=SILENT,
        )
        exact, pruned, counts = _prune_by_hand(experts, ids, share)
    expected = torch.nn.functional.kl_div(
        pruned[:, 1:].double().log_softmax(-1),
        exact[:, 1:].double().log_softmax(-1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    np.testing.assert_allclose(verdict.kl_by_ratio, expected.numpy(), rtol=1e-3, atol=1e-5)
    assert verdict.kl_by_ratio.mean() > 1e-3
    assert len(counts) == len(shape.layers) and set(counts) == {round(share * 60)}


def _prune_by_hand(
    experts: MaskedExperts, ids: torch.Tensor, share: float
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Logits of all experts, those without each layer's lightest second experts beside the
    heaviest, and how many each layer left out; first tokens are prompts."""
    first = torch.arange(ids.numel()) % ids.shape[1] == 0
    found: dict[int, torch.Tensor] = {}

    def ratio(call: LayerCall) -> torch.Tensor:
        heaviest_first = call.weight.sort(dim=1, descending=True).values
        return torch.where(first, torch.inf, heaviest_first[:, 1] / heaviest_first[:, 0])

    def watch(call: LayerCall) -> None:
        found[call.layer] = ratio(call)

    def mask(call: LayerCall) -> torch.Tensor:
        here = found[call.layer].sort().values
        limit = here[round(share * int((~first).sum())) - 1]
        is_left_out = ratio(call) <= limit
        counts.append(int((found[call.layer] <= limit).sum()))
        return torch.stack([torch.ones(len(first)), (~is_left_out).float()], dim=1)

    counts: list[int] = []
    with torch.no_grad():
        experts.watch = watch
        exact = experts.logits(ids)
        experts.watch = None
        return exact, experts.logits(ids, mask=mask), counts
