"""The KV cache that is planned from a configuration is the one that transformers builds."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_tool.runtime.working_set import Workload, kv_cache_bytes, prefill_chunk
from tests.tiny_models import TINY

_WINDOWED = {"gpt_oss"}  # planned at full length although a window keeps it shorter


@pytest.mark.parametrize("arch", TINY)
def test_the_planned_cache_is_the_real_one_plus_one_layer_that_grows(arch: str) -> None:
    config = TINY[arch]()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.inference_mode():
        cache = model(input_ids=torch.zeros(2, 20, dtype=torch.int64), use_cache=True)
    layers = cache.past_key_values.layers
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    planned = kv_cache_bytes(config, Workload(batch=2, positions=20, prompt_tokens=20))
    n_layers = len(layers)
    if arch in _WINDOWED:
        assert planned > real * (n_layers + 1) / n_layers
    else:
        assert planned * n_layers == real * (n_layers + 1)


def test_a_prompt_goes_through_in_chunks_that_the_batch_shares() -> None:
    assert prefill_chunk(Workload(batch=1, positions=4096, prompt_tokens=4096)) == 256
    assert prefill_chunk(Workload(batch=1, positions=4096, prompt_tokens=9)) == 9
    assert prefill_chunk(Workload(batch=3, positions=4096, prompt_tokens=4096)) == 85
    assert prefill_chunk(Workload(batch=64, positions=4096, prompt_tokens=4096)) == 16
