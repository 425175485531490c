"""Experts on a way that gradients take: against plain autograd over their matrices."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from moe_tool.experts.combine import run_experts
from moe_tool.models.moe_layers import find_moe_layers
from moe_tool.quantization.round_to_nearest import dequantize, quantize
from moe_tool.quantization.weights import ExpertWeights, FloatWeight
from moe_tool.tuning.weighed_experts import weighed_experts
from tests.tiny_models import TINY

N_TOKENS = 12


def _module(arch: str):
    model = AutoModelForCausalLM.from_config(TINY[arch](), dtype=torch.float32)
    return find_moe_layers(model)[0].experts


def _weights(module, draw: torch.Generator) -> dict[int, ExpertWeights]:
    """Matrices [out, in], whatever the module's own order is."""
    hidden = 64
    inner = 48
    rows = 2 * inner if module.has_gate else inner
    first = "gate_up_proj" if module.has_gate else "up_proj"
    extents = {first: (rows, hidden), "down_proj": (hidden, inner)}
    if module.has_bias:
        extents |= {f"{first}_bias": (rows,), "down_proj_bias": (hidden,)}
    made = {}
    for expert in range(module.num_experts):
        made[expert] = ExpertWeights()
        for name, shape in extents.items():
            made[expert][name] = FloatWeight(values=torch.randn(shape, generator=draw) / 7)
    return made


def _case(arch: str, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    module = _module(arch)
    weights = _weights(module, draw)
    hidden = torch.randn(N_TOKENS, 64, generator=draw)
    scores = torch.rand(N_TOKENS, module.num_experts, generator=draw)
    weight, index = scores.topk(3, dim=1)
    return module, weights, hidden, index, weight


def _supply(weights):
    def supply(wanted: list[int]) -> Iterator:
        for expert in reversed(wanted):  # any order
            yield expert, weights[expert]

    return supply


def _plainly(module, weights, hidden, index, weight):
    """Every expert on every token, weighed."""
    total = torch.zeros_like(hidden)
    for expert, tensors in weights.items():

        def values(name, tensors=tensors):
            found = tensors.get(name)
            return None if found is None else found.values

        first = "gate_up_proj" if module.has_gate else "up_proj"
        inner = F.linear(hidden, values(first), values(f"{first}_bias"))
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        output = F.linear(inner, values("down_proj"), values("down_proj_bias"))
        total = total + output * (weight * (index == expert)).sum(dim=1, keepdim=True)
    return total


@pytest.mark.parametrize("arch", ["mixtral", "gpt_oss"])
def test_gradients_are_those_of_the_dense_sum(arch: str) -> None:
    module, weights, hidden, index, weight = _case(arch)
    present = torch.ones(index.shape, dtype=torch.bool)
    present[2, 1] = False
    found, wanted = [], []
    for forward, kept in (
        (
            lambda h, w: weighed_experts(module, h, index, w, _supply(weights), present=present),
            found,
        ),
        (lambda h, w: _plainly(module, weights, h, index, w * present), wanted),
    ):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        output = forward(*leaves)
        (output * torch.linspace(-1, 1, 64)).sum().backward()
        kept += [output.detach(), *(leaf.grad for leaf in leaves)]
    for mine, plain in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, plain, atol=1e-4, rtol=1e-4)
    assert float(found[2].abs().sum()) > 0 and float(found[2][2, 1]) == 0


def test_a_hard_mask_gives_the_dense_sum_with_masked_weights() -> None:
    module, weights, hidden, index, weight = _case("mixtral", seed=1)
    mask = torch.ones_like(weight)
    mask[::2, 1:] = 0
    left_out = run_experts(module, hidden, index, weight * mask, _supply(weights), present=mask > 0)
    masked = weighed_experts(module, hidden, index, weight * mask, _supply(weights))
    dense = _plainly(module, weights, hidden, index, weight * mask)
    torch.testing.assert_close(left_out, dense, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(masked, left_out, atol=1e-6, rtol=0)
    assert not torch.allclose(left_out, _plainly(module, weights, hidden, index, weight), atol=0.1)


def test_codes_are_computed_as_in_a_run_and_expanded_on_the_way_back() -> None:
    module, weights, hidden, index, weight = _case("mixtral", seed=2)
    codes, expanded = {}, {}
    for expert, tensors in weights.items():
        codes[expert], expanded[expert] = ExpertWeights(), ExpertWeights()
        for name, each in tensors.items():
            codes[expert][name] = quantize(each.values, 4)
            expanded[expert][name] = FloatWeight(values=dequantize(codes[expert][name]))
    x = hidden.clone().requires_grad_()
    output = weighed_experts(module, x, index, weight, _supply(codes))
    with torch.no_grad():
        as_run = run_experts(module, hidden, index, weight, _supply(codes))
    assert torch.equal(output.detach(), as_run)
    output.sum().backward()
    plain = hidden.clone().requires_grad_()
    _plainly(module, expanded, plain, index, weight).sum().backward()
    torch.testing.assert_close(x.grad, plain.grad, atol=1e-4, rtol=1e-4)
