"""Distances between predictions, against numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch

from moe_tool.evaluation import divergence
from moe_tool.evaluation.divergence import compare_logits, negative_log_likelihood
from moe_tool.evaluation.figures import perplexities


def test_kl_of_two_coins_equals_the_hand_computed_value() -> None:
    fair = torch.log(torch.tensor([[0.5, 0.5]]))
    biased = torch.log(torch.tensor([[0.25, 0.75]])) + 3.0  # logits may carry any constant
    result = compare_logits(fair, biased)
    assert result.kl[0] == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-7)
    reverse = compare_logits(biased, fair)
    assert reverse.kl[0] == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), abs=1e-7)


def test_kl_of_a_prediction_with_itself_is_zero_and_agrees() -> None:
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0))
    result = compare_logits(logits, logits.clone())
    assert np.all(result.kl == 0.0)
    assert result.agrees.all()


def test_agreement_looks_at_the_first_choice_alone() -> None:
    reference = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    other = torch.tensor([[9.0, 0.0, 10.0], [3.0, 0.0, 2.0]])
    assert compare_logits(reference, other).agrees.tolist() == [True, False]


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    reference = torch.randn(7, 16, generator=generator)
    other = torch.randn(7, 16, generator=generator)
    targets = torch.arange(7)
    whole = compare_logits(reference, other)
    nll = negative_log_likelihood(reference, targets)
    monkeypatch.setattr(divergence, "_BLOCK_BYTES", 2 * 8 * 16)
    assert np.array_equal(compare_logits(reference, other).kl, whole.kl)
    assert np.array_equal(negative_log_likelihood(reference, targets), nll)


def test_perplexity_of_a_uniform_prediction_is_the_vocabulary() -> None:
    nll = negative_log_likelihood(torch.zeros(4, 10), torch.tensor([0, 3, 9, 1]))
    assert perplexities(nll[None]) == pytest.approx([10.0])
    assert perplexities(np.array([[1000.0, 2000.0]])).tolist() == [math.inf]
