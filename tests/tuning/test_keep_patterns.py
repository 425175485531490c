"""Drawn masks: what they may look like, how often, and which gradient they pass on."""

import numpy as np
import pytest
import torch

from moe_tool.policies.misses.prune_learned import n_kept
from moe_tool.tuning.keep_patterns import draw_mask, hard_mask, pattern_logits

WORTH = torch.tensor([[0.5, -1.0]])


def _uniform(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, generator=torch.Generator().manual_seed(seed))


def test_a_drawn_mask_keeps_the_heaviest_and_never_skips_one() -> None:
    mask = draw_mask(WORTH.expand(500, 2), _uniform(500), tau=0.7)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert (mask[:, 0] == 1).all() and (mask[:, 1] >= mask[:, 2]).all()


def test_patterns_are_drawn_as_often_as_their_logits_say() -> None:
    mask = draw_mask(WORTH.expand(40000, 2), _uniform(40000), tau=0.7)
    found = torch.bincount(mask.sum(dim=1).long() - 1, minlength=3) / 40000
    wanted = torch.softmax(torch.tensor([0.0, 0.5, -0.5]), dim=0)  # by hand: 0, 0.5, 0.5 - 1
    torch.testing.assert_close(found, wanted, atol=0.01, rtol=0)
    assert pattern_logits(WORTH).tolist() == [[0.0, 0.5, -0.5]]


def test_the_gradient_is_that_of_the_relaxed_mask() -> None:
    """Of two experts the second one's relaxed mask is a logistic function: by difference."""
    tau, uniform = 0.8, torch.tensor([[0.3, 0.6]])
    gumbel = -torch.log(-torch.log(uniform.double()))[0]

    def relaxed(worth: float) -> float:
        return float(torch.sigmoid((worth + gumbel[1] - gumbel[0]) / tau))

    worth = torch.tensor([[0.4]], requires_grad=True)
    draw_mask(worth, uniform, tau=tau)[0, 1].backward()
    assert worth.grad is not None
    difference = (relaxed(0.4 + 1e-4) - relaxed(0.4 - 1e-4)) / 2e-4
    assert float(worth.grad) == pytest.approx(difference, rel=1e-3)


def test_without_noise_training_and_policy_keep_the_same() -> None:
    worth = torch.randn(2000, 3, generator=torch.Generator().manual_seed(5))
    for offset in (-1.0, 0.0, 0.4):
        kept = hard_mask(worth, offset=offset).sum(dim=1).numpy()
        np.testing.assert_array_equal(kept, n_kept(worth.numpy(), offset))
