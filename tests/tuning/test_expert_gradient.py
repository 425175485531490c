"""An expert's way back beside autograd over the whole of it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from moe_tool.experts.expert_forward import expert_forward
from moe_tool.models.architecture import open_model
from moe_tool.models.layer_stream import LayerStream
from moe_tool.models.locate import LocatedModel
from moe_tool.quantization.round_to_nearest import dequantize, quantize
from moe_tool.quantization.weights import FloatWeight
from moe_tool.tuning.expert_gradient import expert_pass, first_matrix, gradients
from moe_tool.tuning.tune_layer import unpack_expert


@pytest.mark.parametrize("arch", ["mixtral", "gpt_oss"])
def test_output_and_gradients_are_those_of_autograd(
    tiny_checkpoint: Callable[..., Path], arch: str
) -> None:
    folder = tiny_checkpoint(arch)
    opened = open_model(LocatedModel(folder=folder, name="tiny"))
    with opened.checkpoint:
        stream = LayerStream(folder, opened.checkpoint)
        module = stream.moe_layers[0].experts
        tensors = opened.experts.read(stream.moe_layers[0].layer, 1)
    coded = {
        n: quantize(w, 3, group=32) if w.dim() == 2 else FloatWeight(w) for n, w in tensors.items()
    }
    expert = unpack_expert(coded)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 64, generator=generator)
    by_output = torch.randn(9, 64, generator=generator)

    values = {n: dequantize(w).requires_grad_() for n, w in coded.items() if n in expert.matrices}
    first = first_matrix(module)
    bias = lambda name: tensors.get(f"{name}_bias")  # noqa: E731
    inner = module._apply_gate(F.linear(x, values[first], bias(first)))
    wanted = F.linear(inner, values["down_proj"], bias("down_proj"))
    wanted.backward(by_output)

    done = expert_pass(module, tuple(tensors), expert.values, x)
    assert torch.allclose(done.output, wanted, rtol=1e-4, atol=1e-4)
    exact = {n: FloatWeight(values.get(n, tensors[n]).detach()) for n in tensors}
    assert torch.allclose(done.output, expert_forward(module, exact, x), rtol=1e-4, atol=1e-4)
    found = gradients(module, expert.matrices, done, by_output)
    assert found.keys() == expert.matrices.keys()
    for name, gradient in found.items():
        by_weights = values[name].grad
        assert by_weights is not None
        by_codes = expert.matrices[name].by_codes(by_weights.clone())
        assert torch.allclose(gradient, by_codes, rtol=1e-3, atol=1e-4), name
        assert float(gradient.abs().max()) > 0
