"""Attention that tokens receive: by hand, and against what transformers says of itself."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from moe_tool.errors import UsageError
from moe_tool.models.attention_sums import AttentionSums, received_attention
from moe_tool.models.moe_layers import decoder_layers

IDS = torch.tensor([[5, 9, 11, 3, 70, 8], [1, 2, 3, 4, 5, 6]])


def test_columns_are_summed_from_each_token_on_and_averaged() -> None:
    rows = [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]
    weights = torch.tensor([[rows, rows]])  # [1, 2 heads, 3, 3]
    found = received_attention(weights)
    torch.testing.assert_close(found, torch.tensor([[1.7 / 3, 0.8 / 2, 0.5]]))
    # keys of an earlier chunk stand before the chunk's own
    earlier = torch.cat([torch.full((1, 2, 3, 4), 9.0), weights], dim=-1)
    torch.testing.assert_close(received_attention(earlier), found)


@torch.no_grad()
@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v2", "olmoe"])
def test_they_are_those_of_the_models_own_attention_and_leave_its_output(
    arch: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    folder = tiny_checkpoint(arch)
    eager = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    output = eager(input_ids=IDS, output_attentions=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = model(input_ids=IDS).logits
    layers = range(len(decoder_layers(model)))
    sums = AttentionSums(model, layers)
    sums.listen(True)
    logits = model(input_ids=IDS).logits
    for layer in layers:
        weights = output.attentions[layer]
        by_hand = torch.zeros(IDS.shape)
        for row in range(IDS.shape[0]):
            for token in range(IDS.shape[1]):
                received = weights[row, :, token:, token].mean(dim=0)  # of the queries from it on
                by_hand[row, token] = received.mean()
        torch.testing.assert_close(sums.take(layer), by_hand, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits, output.logits, atol=1e-5, rtol=1e-4)
    sums.listen(False)
    assert torch.equal(model(input_ids=IDS).logits, before)  # by the fast path again
    sums.close()
    assert not any(layer.self_attn._forward_hooks for layer in decoder_layers(model))


def test_a_model_without_such_attention_is_refused(tiny_checkpoint: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("mixtral"), dtype=torch.float32)
    layer = decoder_layers(model)[1]
    layer.mixer = layer.self_attn
    del layer.self_attn
    with pytest.raises(UsageError, match="layer 1"):
        AttentionSums(model, [0, 1])

    class Silent(nn.Module):
        def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
            return hidden, None

    layer.self_attn = Silent()
    sums = AttentionSums(model, [1])
    sums.listen(True)
    with pytest.raises(UsageError, match="does not return"):
        layer.self_attn(torch.zeros(1, 2, 4))
