"""The cache that does not copy holds what transformers' own holds."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, MixtralConfig

from moe_tool.models.kv_cache import new_kv_cache
from tests.tiny_models import TINY

CONFIG = MixtralConfig(num_hidden_layers=1)


def _states(n_positions, n_sequences=2, start=0.0):
    """[B, 1 head, n, 1]: every position filled with its own number."""
    numbers = torch.arange(n_positions) + start
    return numbers.view(1, 1, -1, 1).expand(n_sequences, 1, -1, 1).clone()


def _numbers(states, sequence=0):
    return states[sequence, 0, :, 0].tolist()


def test_a_token_moves_nothing_within_the_planned_positions():
    cache = new_kv_cache(CONFIG, n_positions=5)
    keys, values = cache.update(_states(3), _states(3, start=10), 0)
    place = keys.data_ptr()
    for position in (3, 4):
        keys, values = cache.update(_states(1, start=position), _states(1, start=10 + position), 0)
        assert keys.data_ptr() == place
    assert _numbers(keys) == [0, 1, 2, 3, 4] and _numbers(values) == [10, 11, 12, 13, 14]
    assert cache.get_seq_length() == 5


def test_more_positions_than_planned_are_taken():
    cache = new_kv_cache(CONFIG, n_positions=2)
    cache.update(_states(2), _states(2), 0)
    keys, values = cache.update(_states(3, start=2), _states(3, start=2), 0)
    assert _numbers(keys) == _numbers(values) == [0, 1, 2, 3, 4]


def test_positions_taken_away_are_written_over():
    cache = new_kv_cache(CONFIG, n_positions=8)
    cache.update(_states(4), _states(4), 0)
    cache.crop(-3)
    keys, _ = cache.update(_states(1, start=7), _states(1, start=7), 0)
    assert _numbers(keys) == [0, 7]


def test_other_sequences_go_on_by_themselves():
    cache = new_kv_cache(CONFIG, n_positions=8)
    states = torch.cat([_states(2, 1), _states(2, 1, start=5)])
    cache.update(states, states, 0)
    cache.reorder_cache(torch.tensor([1, 0]))
    keys, values = cache.update(_states(1, start=9), _states(1, start=9), 0)
    assert _numbers(keys) == [5, 6, 9] and _numbers(values, 1) == [0, 1, 9]
    cache.batch_select_indices(torch.tensor([1]))
    keys, _ = cache.update(_states(1, 1, start=3), _states(1, 1, start=3), 0)
    assert _numbers(keys) == [0, 1, 9, 3]


def test_an_emptied_cache_starts_anew():
    cache = new_kv_cache(CONFIG, n_positions=4)
    cache.update(_states(4), _states(4), 0)
    cache.reset()
    assert cache.get_seq_length() == 0
    keys, _ = cache.update(_states(2, start=3), _states(2, start=3), 0)
    assert _numbers(keys) == [3, 4]


def test_a_cache_of_inference_mode_can_be_continued_outside_it():
    cache = new_kv_cache(CONFIG, n_positions=4)
    with torch.inference_mode():
        cache.update(_states(2), _states(2), 0)
    keys, _ = cache.update(_states(1, start=2), _states(1, start=2), 0)
    assert _numbers(keys) == [0, 1, 2]


@pytest.mark.parametrize("arch", TINY)
@torch.no_grad()
def test_logits_are_those_with_the_cache_of_transformers(arch):
    torch.manual_seed(0)
    config = TINY[arch]()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    theirs, ours = DynamicCache(config=config), new_kv_cache(config, n_positions=16)
    parts = [torch.randint(0, 250, (2, n)) for n in (9, 1, 4, 1, 1, 3)]  # 19 positions
    for ids in parts:
        expected = model(input_ids=ids, past_key_values=theirs).logits
        found = model(input_ids=ids, past_key_values=ours).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # strides may differ
