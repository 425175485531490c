"""The account of expected loss: sums, running means, retreat."""

import numpy as np
import pytest

from moe_tool.runtime.quality_account import WINDOW_TOKENS, QualityAccount


def _spend(account, prices):
    exact = account.begin_token()
    account.add(np.where(exact, 0.0, np.asarray(prices, dtype=float)))
    return exact


def test_it_adds_up_in_calibrated_nats():
    account = QualityAccount(nats_per_price=2.0)
    account.begin_sequences(2)
    for _ in range(3):
        assert not _spend(account, [0.5, 0.0]).any()
    assert account.tokens == 6 and account.spent == 3.0
    assert account.nats_per_token == 0.5


def test_a_sequence_above_the_limit_retreats_and_its_neighbour_does_not():
    account = QualityAccount(limit=0.1)
    account.begin_sequences(2)
    exact = np.array([_spend(account, [0.4, 0.05]) for _ in range(400)])
    assert not exact[0].any() and not exact[:, 1].any()
    assert exact[:, 0].mean() > 0.7  # a quarter of the tokens uses up the limit
    spent = 0.4 * (~exact[:, 0]).sum() / 400
    assert 0.08 < spent < 0.13
    assert account.exact_tokens == exact.sum()


def test_it_comes_back_once_the_text_is_familiar_again():
    account = QualityAccount(limit=0.1)
    account.begin_sequences(1)
    for _ in range(50):
        _spend(account, [1.0])
    familiar = [bool(_spend(account, [0.01])[0]) for _ in range(8 * WINDOW_TOKENS)]
    assert familiar[0] and not any(familiar[-WINDOW_TOKENS:])


def test_other_sequences_begin_with_a_clean_mean():
    account = QualityAccount(limit=0.1)
    account.begin_sequences(1)
    for _ in range(5):
        _spend(account, [1.0])
    account.begin_sequences(3)
    assert not account.begin_token().any()


def test_measured_and_expected_losses_are_kept_side_by_side():
    account = QualityAccount(nats_per_price=2.0)
    account.begin_sequences(1)
    _spend(account, [0.1])
    account.judge(0.6, expected=0.2, tokens=1)
    account.judge(0.3, expected=0.5, tokens=2)
    assert account.judged_tokens == 3
    assert account.judged_measured == pytest.approx(0.9)
    assert account.judged_spent == pytest.approx(0.7)
    assert account.spent == pytest.approx(0.2)  # what was measured changes nothing here


def test_the_mean_of_the_last_closed_token_is_known():
    account = QualityAccount()
    account.begin_sequences(2)
    _spend(account, [0.1, 0.3])
    _spend(account, [0.0, 0.0])
    assert account.last_token == pytest.approx(0.2)
    account.begin_sequences(2)
    assert account.last_token == 0


def test_a_prompts_spending_is_kept_apart():
    account = QualityAccount(nats_per_price=2.0, limit=0.1)
    account.begin_sequences(1)
    account.add_prompt(5.0)
    assert (account.prompt_spent, account.spent) == (10.0, 0.0)
    assert not _spend(account, [0.01]).any() and not _spend(account, [0.01]).any()
