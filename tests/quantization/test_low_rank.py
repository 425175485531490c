"""A low-rank map: what it recovers, and that it stays sane."""

import torch

from moe_tool.quantization.low_rank import linear_fit, low_rank_map

HIDDEN = 24


def _answer(tensors, x):
    wide = {name: value.float() for name, value in tensors.items()}
    return x @ wide["low_rank_in"].T @ wide["low_rank_out"].T + wide["low_rank_offset"]


def _relative(truth, answer):
    return float((truth - answer).norm() / truth.norm())


def test_a_map_of_its_own_rank_is_recovered():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(20000, HIDDEN, generator=draw) + 0.5
    left = torch.randn(HIDDEN, 3, generator=draw)
    right = torch.randn(3, HIDDEN, generator=draw)
    y = x @ right.T @ left.T + torch.randn(HIDDEN, generator=draw)
    fit = linear_fit(x, y)
    assert _relative(y, _answer(low_rank_map(fit, 3), x)) < 5e-3
    errors = [_relative(y, _answer(low_rank_map(fit, rank), x)) for rank in (1, 2, 3)]
    assert errors[0] > errors[1] > 10 * errors[2]


def test_of_two_directions_the_one_with_more_energy_is_kept():
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(5000, HIDDEN, generator=draw)
    y = torch.zeros(5000, HIDDEN)
    y[:, 0], y[:, 1] = 5 * x[:, 2], x[:, 3]
    answer = _answer(low_rank_map(linear_fit(x, y), 1), x)
    assert _relative(y[:, 0], answer[:, 0]) < 0.01
    assert answer[:, 1].abs().max() < 0.2


def test_fewer_tokens_than_inputs_do_not_run_wild_on_others():
    draw = torch.Generator().manual_seed(2)
    x, others = torch.randn(8, HIDDEN, generator=draw), torch.randn(500, HIDDEN, generator=draw)
    noise = torch.randn(8, HIDDEN, generator=draw)
    answer = _answer(low_rank_map(linear_fit(x, noise), 4), others)
    assert answer.norm(dim=1).mean() < 2 * noise.norm(dim=1).mean()


def test_without_tokens_or_output_the_map_is_zero_and_a_rank_beyond_the_width_is_filled_up():
    nothing = low_rank_map(linear_fit(torch.zeros(0, HIDDEN), torch.zeros(0, HIDDEN)), 4)
    assert not any(value.any() for value in nothing.values())
    x = torch.randn(50, HIDDEN, generator=torch.Generator().manual_seed(3))
    wide = low_rank_map(linear_fit(x, x), HIDDEN + 8)
    assert wide["low_rank_in"].shape == (HIDDEN + 8, HIDDEN)
    assert all(torch.isfinite(value).all() for value in wide.values())
    assert not wide["low_rank_in"][HIDDEN:].any()
