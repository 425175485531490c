"""One expert against transformers' own experts modules."""

from types import SimpleNamespace

import pytest
import torch
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moe_tool.artifacts.moe_shape import ExpertTensor
from moe_tool.artifacts.precision import precision_from_bits
from moe_tool.experts.expert_forward import expert_forward
from moe_tool.formats.record_form import record_form
from moe_tool.native.kernels import is_native
from moe_tool.packing.expert_coding import coded
from moe_tool.quantization.weights import FloatWeight
from tests.formats.shapes import shape_of


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


@pytest.mark.parametrize("bits", ["native", "4"])
def test_what_is_prepared_of_a_slot_holds_for_every_expert_that_is_read_into_it(bits):
    config = GptOssConfig(hidden_size=32, intermediate_size=64, num_local_experts=2)
    module = _filled(GptOssExperts(config))
    tensors = (
        ExpertTensor(name="gate_up_proj", shape=(128, 32)),
        ExpertTensor(name="gate_up_proj_bias", shape=(128,)),
        ExpertTensor(name="down_proj", shape=(32, 64)),
        ExpertTensor(name="down_proj_bias", shape=(32,)),
    )
    precision = precision_from_bits(bits)
    form = record_form(shape_of(tensors), precision)
    slot = torch.zeros(form.layout.size_bytes, dtype=torch.uint8)
    kept = form.decode(slot)
    x = torch.randn(1, 32)
    outputs = []
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        values = {t.name: torch.randn(t.shape, generator=draw).bfloat16() for t in tensors}
        slot.copy_(form.encode(coded(values, precision)))
        fresh = form.decode(slot.clone())
        outputs.append(expert_forward(module, kept, x))
        assert torch.equal(outputs[-1], expert_forward(module, fresh, x))
    assert (kept.prepared is not None) == is_native()
    assert not torch.equal(outputs[0], outputs[1])
