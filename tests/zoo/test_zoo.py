"""Every MoE model type of transformers packs, runs and streams exactly as transformers computes."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    GenerationConfig,
    PreTrainedModel,
)

from moe_tool.errors import UnsupportedModelError
from moe_tool.formats.safetensors_index import Checkpoint
from moe_tool.models.layer_stream import LayerStream
from moe_tool.models.locate import LocatedModel
from moe_tool.quantization.weights import FloatWeight
from moe_tool.runtime.decoding_config import GenerateOptions
from moe_tool.runtime.generation import generate_ids
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import open_session
from tests.packed import pack_bundle
from tests.tiny_models import tiny_tokenizer
from tests.zoo.zoo_table import ZOO

N_GENERATED = 16
TOLERANCE = 1e-4
"""Largest difference of logits, in their standard deviations: products in another order"""
PROMPT = [int(byte) for byte in b"The quick brown fox jumps over"]
EVERYDAY = [
    pytest.param(
        name, marks=[pytest.mark.slow, *([] if ZOO[name].represents else [pytest.mark.zoo])]
    )
    for name in ZOO
]
Made = tuple[str, Path, PreTrainedModel]


@pytest.fixture(scope="module", params=EVERYDAY)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Name in ZOO, a random checkpoint, and the model that it was saved from."""
    return request.param, *make_checkpoint(request.param, tmp_path_factory.mktemp("zoo") / "model")


def make_checkpoint(name: str, folder: Path) -> tuple[Path, PreTrainedModel]:
    config = ZOO[name].config(name)
    kinds = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
    kind = next(kind for kind in kinds if type(config) in kind._model_mapping)
    torch.manual_seed(0)
    model = kind.from_config(config, dtype=torch.float32).eval()
    fill(model, seed=sum(name.encode()))
    model.generation_config = GenerationConfig(pad_token_id=258)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder, model


@torch.no_grad()
def fill(model: PreTrainedModel, seed: int) -> None:
    """Draw every stored tensor so that it matters, and hash tables of distinct experts."""
    generator = torch.Generator().manual_seed(seed)
    stored = model.state_dict()
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in stored]
    for name, tensor in [*model.named_parameters(), *buffers]:
        if name.endswith("tid2eid"):
            n_experts = model.config.get_text_config().n_routed_experts
            rows = [torch.randperm(n_experts, generator=generator) for _ in range(len(tensor))]
            tensor.copy_(torch.stack(rows)[:, : tensor.shape[1]])
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        is_matrix = tensor.ndim >= 2 and "norm" not in name and not name.endswith("_bias")
        if is_matrix and not name.endswith(("A_log", "dt_bias")):
            tensor.copy_(1.2 * noise / tensor.shape[-1] ** 0.5)
        else:
            tensor.add_(0.05 * noise)


@torch.no_grad()
def test_a_bundle_generates_the_tokens_of_transformers(made: Made, tmp_path: Path) -> None:
    name, folder, model = made
    wanted = model.generate(
        input_ids=torch.tensor([PROMPT]), max_new_tokens=N_GENERATED, do_sample=False
    )[0, len(PROMPT) :].tolist()
    pack_bundle(LocatedModel(folder=folder, name="zoo"), out=tmp_path / "b", bits="native")
    options = GenerateOptions(max_tokens=N_GENERATED, ignore_eos=True)
    with open_session(tmp_path / "b", run_options(memory="min", context=64)) as session:
        assert list(generate_ids(session, [PROMPT], options).token_ids[0]) == wanted
    assert len(set(wanted)) > 1 or name == "zaya", "a constant text proves nothing"


@torch.no_grad()
def test_layers_run_one_by_one_give_the_logits_of_the_whole(
    made: Made,
) -> None:
    name, folder, model = made
    with Checkpoint.open_folder(folder) as checkpoint:
        if not ZOO[name].streams:
            with pytest.raises(UnsupportedModelError, match="layer by layer"):
                LayerStream(folder, checkpoint)
            return
        stream = LayerStream(folder, checkpoint)
        stream.set_experts_function(
            lambda call: call.run_experts(partial(supply, stream, call.layer))
        )
        generator = torch.Generator().manual_seed(1)
        batches = [torch.randint(3, 250, shape, generator=generator) for shape in ((2, 20), (1, 9))]
        states = [stream.initial_hidden(ids) for ids in batches]
        for layer in stream.layers():
            states = [layer.forward(state) for state in states]
        for ids, state in zip(batches, states, strict=True):
            wanted = model(input_ids=ids, use_cache=False).logits
            assert (stream.logits(state) - wanted).abs().max() <= TOLERANCE * wanted.std()


def supply(
    stream: LayerStream, layer: int, experts: list[int]
) -> Iterator[tuple[int, Mapping[str, FloatWeight]]]:
    for expert in experts:
        read = stream.experts.read(layer, expert)
        yield expert, {name: FloatWeight(values=value) for name, value in read.items()}
