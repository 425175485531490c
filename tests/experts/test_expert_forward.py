"""One expert against transformers' own experts modules."""

from types import SimpleNamespace

import pytest
import torch
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moe_tool.experts.expert_forward import expert_forward
from moe_tool.quantization.weights import FloatWeight


def _filled(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module.requires_grad_(False)


def _one_token_per_expert(module, x):
    """Return [E, H]: the module's own output of expert e on row e, with gate weight 1."""
    n_experts = x.shape[0]
    return module(x, torch.arange(n_experts)[:, None], torch.ones(n_experts, 1))


def test_a_gated_expert_equals_transformers_bit_for_bit():
    config = MixtralConfig(
        hidden_size=24, intermediate_size=40, num_local_experts=4, experts_implementation="eager"
    )
    module = _filled(MixtralExperts(config))
    x = torch.randn(4, 24)
    expected = _one_token_per_expert(module, x)
    for expert in range(4):
        weights = {name: FloatWeight(p[expert]) for name, p in module.named_parameters()}
        assert torch.equal(expert_forward(module, weights, x[[expert]]), expected[[expert]])


def test_a_transposed_expert_with_biases_takes_canonical_weights():
    config = GptOssConfig(
        hidden_size=24, intermediate_size=40, num_local_experts=4, experts_implementation="eager"
    )
    module = _filled(GptOssExperts(config))
    assert module.is_transposed and module.has_bias
    x = torch.randn(4, 24)
    expected = _one_token_per_expert(module, x)
    for expert in range(4):
        weights = {
            name: FloatWeight(p[expert].T.contiguous() if p.dim() == 3 else p[expert])
            for name, p in module.named_parameters()
        }
        # the transposed product may sum in another order
        torch.testing.assert_close(
            expert_forward(module, weights, x[[expert]]), expected[[expert]], rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("has_norm", [False, True])
def test_an_ungated_expert_by_hand(has_norm):
    module = SimpleNamespace(
        has_gate=False,
        act_fn=torch.relu,
        has_post_expert_norm=has_norm,
        post_expert_norm=lambda output: output * 10,
    )
    weights = {
        "up_proj": FloatWeight(torch.tensor([[1.0, -1.0], [2.0, 0.0]])),
        "down_proj": FloatWeight(torch.tensor([[1.0, 1.0]])),
    }
    # up: [3 - 5, 6] -> relu [0, 6] -> 6
    output = expert_forward(module, weights, torch.tensor([[3.0, 5.0]]))
    assert output.tolist() == [[60.0 if has_norm else 6.0]]
