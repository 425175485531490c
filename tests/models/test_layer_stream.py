"""Streaming layer by layer gives the logits of the whole model and reads every tensor once."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_tool.formats.safetensors_index import Checkpoint
from moe_tool.models.layer_stream import LayerStream
from tests.models.eager_experts import eager_experts, read_once
from tests.tiny_models import TINY, VOCABULARY

# Equal up to the order of a transposed product; logits spread over about 1.5.
TOLERANCE = {"gpt_oss": 1e-5}


def batches() -> list[torch.Tensor]:
    """Three shapes, one of them twice, all longer than the sliding window of gpt_oss."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, 24), (1, 40), (2, 24), (4, 9)]
    return [torch.randint(0, VOCABULARY - 4, shape, generator=generator) for shape in shapes]


def open_stream(folder: Path, checkpoint: Checkpoint) -> LayerStream:
    stream = LayerStream(folder, checkpoint)
    read = read_once(stream.experts.read)
    for layer in stream.shape.layers:
        for expert in range(stream.shape.experts):
            read(layer, expert)
    stream.set_experts_function(eager_experts(read))
    return stream


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arch", TINY)
def test_streamed_logits_equal_those_of_the_eager_model(
    arch: str, dtype: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    folder = tiny_checkpoint(arch, dtype)
    reference = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    )
    with Checkpoint.open_folder(folder) as checkpoint:
        stream = open_stream(folder, checkpoint)
        hidden = [stream.initial_hidden(ids) for ids in batches()]
        for layer in stream.layers():
            hidden = [layer.forward(states) for states in hidden]
        for ids, states in zip(batches(), hidden, strict=True):
            wanted = reference(ids).logits
            assert (stream.logits(states) - wanted).abs().max() <= TOLERANCE.get(arch, 0.0)
        assert checkpoint.bytes_read == checkpoint.total_bytes


@pytest.mark.parametrize("arch", TINY)
def test_only_one_layer_and_the_routers_are_in_memory(
    arch: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    folder = tiny_checkpoint(arch)
    with Checkpoint.open_folder(folder) as checkpoint:
        stream = LayerStream(folder, checkpoint)
        routers = {p for m in stream.moe_layers for p in m.router.parameters()}
        assert not any(parameter.is_meta for parameter in routers)
        decoder_layers = stream.model.model.layers
        for layer in stream.layers():
            for index, module in enumerate(decoder_layers):
                loaded = {p for p in module.parameters() if not p.is_meta} - routers
                assert bool(loaded) == (index == layer.layer)
                if index == layer.layer:
                    assert not any(p.is_meta for p in module.parameters())
        assert not {p for p in decoder_layers.parameters() if not p.is_meta} - routers


def test_a_stream_starts_in_the_middle(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("deepseek_v3")
    ids = batches()[0]
    with Checkpoint.open_folder(folder) as checkpoint:
        stream = open_stream(folder, checkpoint)
        boundaries = [stream.initial_hidden(ids)]
        for layer in stream.layers():
            boundaries.append(layer.forward(boundaries[-1]))
    with Checkpoint.open_folder(folder) as checkpoint:
        resumed = open_stream(folder, checkpoint)
        hidden = boundaries[2]
        for layer in resumed.layers(start=2):
            assert layer.layer == 2
            hidden = layer.forward(hidden)
        assert torch.equal(hidden, boundaries[3])
        assert checkpoint.bytes_read < checkpoint.total_bytes


@torch.no_grad()
@pytest.mark.parametrize("arch", TINY)
def test_a_router_asked_again_answers_as_in_the_model(
    arch: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    folder = tiny_checkpoint(arch)
    with Checkpoint.open_folder(folder) as checkpoint:
        stream = LayerStream(folder, checkpoint)
        by_layer = {modules.layer: modules for modules in stream.moe_layers}
        seen = []

        def check(call: object) -> torch.Tensor:
            routed = by_layer[call.layer].route(call.hidden)
            assert torch.equal(routed.logits, call.router_logits)
            assert torch.equal(routed.index, call.index)
            assert torch.equal(routed.weight, call.weight)
            seen.append(call.layer)
            return torch.zeros_like(call.hidden)

        stream.set_experts_function(check)
        hidden = stream.initial_hidden(batches()[0])
        for layer in stream.layers():
            hidden = layer.forward(hidden)
            assert (layer.moe is not None) == (layer.layer in stream.shape.layers)
        assert seen == list(stream.shape.layers)
