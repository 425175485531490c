"""The restated router rules agree with the routers of transformers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moe_tool.models.moe_layers import MoeLayerModules, find_moe_layers
from moe_tool.models.router_rule import RouterRule, router_rule, weights_of_sets
from tests.tiny_models import TINY

DIFFERS = {"deepseek_v2", "deepseek_v3", "glm4_moe", "ernie4_5_moe", "minimax_m2"}


def load(folder: Path) -> tuple[PreTrainedModel, MoeLayerModules, RouterRule]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    modules = find_moe_layers(model)[-1]
    rule = router_rule(modules, model.config)
    assert rule is not None
    return model, modules, rule


def inputs(seed: int = 5) -> torch.Tensor:
    return torch.randn(500, 64, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("arch", TINY)
def test_weights_and_selection_agree_with_the_router(
    arch: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    _, modules, rule = load(tiny_checkpoint(arch))
    routed = modules.route(inputs())
    weights = rule.weights(routed.logits, routed.index)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, routed.weight, atol=1e-6, rtol=0)
    scores = rule.selection_scores(routed.logits)
    assert scores.shape == routed.logits.shape
    assert torch.isfinite(scores).all()
    chosen = scores.topk(routed.index.shape[1])[1]
    assert torch.equal(chosen.sort()[0], routed.index.sort()[0])


@torch.no_grad()
@pytest.mark.parametrize("arch", TINY)
def test_scores_differ_where_they_order_experts_otherwise_than_logits(
    arch: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    _, modules, rule = load(tiny_checkpoint(arch))
    logits = modules.route(inputs()).logits
    by_score = rule.selection_scores(logits).argsort(descending=True)
    assert rule.scores_differ == (arch in DIFFERS)
    assert rule.scores_differ != torch.equal(by_score, logits.argsort(descending=True))


@torch.no_grad()
@pytest.mark.parametrize("arch", TINY)
def test_weights_follow_the_order_of_the_index(
    arch: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    _, modules, rule = load(tiny_checkpoint(arch))
    logits = modules.route(inputs()).logits
    index = torch.tensor([[4, 0, 2]]).expand(500, 3)
    found = rule.weights(logits, index)
    assert torch.isfinite(found).all()
    assert (found >= 0).all()
    torch.testing.assert_close(found.flip(1), rule.weights(logits, index.flip(1)))


@torch.no_grad()
@pytest.mark.parametrize(
    "arch", sorted(set(TINY) - {"deepseek_v2", "qwen2_moe", "olmoe", "phimoe"})
)
def test_a_renormalising_model_renormalises_any_set(
    arch: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    _, modules, rule = load(tiny_checkpoint(arch))
    logits = modules.route(inputs()).logits
    index = torch.tensor([[4, 0, 2]]).expand(500, 3)
    total = rule.weights(logits, index).sum(dim=-1)
    scale = 2.5 if arch == "deepseek_v3" else 1.0
    torch.testing.assert_close(total, torch.full((500,), scale), atol=1e-5, rtol=0)


def test_softmax_weights_are_those_worked_out_by_hand(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    logits = torch.log(torch.tensor([[1.0, 2.0, 3.0, 4.0, 0.5, 0.5, 1.0, 4.0]]))  # sums to 16
    index = torch.tensor([[3, 2]])
    _, _, normalized = load(tiny_checkpoint("mixtral"))
    torch.testing.assert_close(normalized.weights(logits, index), torch.tensor([[4 / 7, 3 / 7]]))
    _, _, plain = load(tiny_checkpoint("olmoe"))
    torch.testing.assert_close(plain.weights(logits, index), torch.tensor([[4 / 16, 3 / 16]]))


def test_sparsemixer_treats_passed_over_experts_as_absent(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    _, _, rule = load(tiny_checkpoint("phimoe"))
    low = -1e4
    with_best = torch.tensor([[5.0, 3.0, 2.9, 1.0, low, low, low, low]])
    without = with_best.clone()
    without[0, 0] = low
    index = torch.tensor([[1, 2]])
    torch.testing.assert_close(rule.weights(with_best, index), rule.weights(without, index))
    # 2.9 is within 0.6 of 3 relative to 3; 1.0 is not: (3 - 1) / 3 > 0.6
    first = torch.tensor([3.0, 2.9]).softmax(0)[0].item()
    assert rule.weights(without, index)[0, 0].item() == pytest.approx(first)


def test_an_unknown_architecture_has_no_rule(tiny_checkpoint: Callable[..., Path]) -> None:
    model, modules, _ = load(tiny_checkpoint("mixtral"))
    model.config.model_type = "something_new"
    assert router_rule(modules, model.config) is None


@torch.no_grad()
@pytest.mark.parametrize("arch", TINY)
def test_an_empty_slot_is_left_out_of_the_set(
    arch: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    _, modules, rule = load(tiny_checkpoint(arch))
    logits = modules.route(inputs()).logits
    index = torch.tensor([[4, 0, 2]]).repeat(500, 1)
    present = torch.ones(index.shape, dtype=torch.bool)
    present[:100, 1] = False
    present[100:200, 0] = False
    present[200:300, :2] = False
    present[300:400] = False
    found = weights_of_sets(rule, logits, index, present)
    assert (found[~present] == 0).all()
    for rows, kept in (
        (slice(0, 100), [4, 2]),
        (slice(100, 200), [0, 2]),
        (slice(200, 300), [2]),
        (slice(400, 500), [4, 0, 2]),
    ):
        own = torch.tensor([kept]).expand(100, len(kept))
        columns = torch.tensor([[4, 0, 2].index(expert) for expert in kept])
        alone = rule.weights(logits[rows], own)
        assert torch.equal(found[rows][:, columns], alone.float())
