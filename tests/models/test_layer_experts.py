"""A layer's experts in memory are those of the checkpoint, whatever form they are held in."""

from pathlib import Path

import pytest
import torch

from moe_tool.models.architecture import OpenedModel, open_model
from moe_tool.models.expert_source import ExpertSource
from moe_tool.models.layer_experts import LayerExperts, layer_experts_bytes
from moe_tool.models.locate import LocatedModel
from moe_tool.quantization.kept_codes import KeptWeight
from tests.models.stored_formats.test_coded_models import MODELS, write_pair
from tests.tiny_models import make_tiny_checkpoint

CODED_SHARE = 0.35
"""Most of the float32 bytes that a layer of codes takes: 8 bits and their scales"""


def opened(folder: Path) -> OpenedModel:
    return open_model(LocatedModel(folder=folder, name="tiny"))


def require_equal(held: LayerExperts, source: ExpertSource, layer: int) -> None:
    for expert, weights in held.items():
        exact = source.read(layer, expert)
        assert weights.keys() == exact.keys()
        for name, values in exact.items():
            found = weights[name].values
            assert found.dtype == values.dtype and torch.equal(found, values)


@pytest.mark.parametrize("name", MODELS)
def test_codes_are_held_and_decode_to_what_is_read(name: str, tmp_path: Path) -> None:
    coded, _ = write_pair(name, tmp_path)
    model = opened(coded)
    with model.checkpoint:
        shape, source = model.shape, model.experts
        for layer in shape.layers:
            require_equal(LayerExperts(source, shape, layer), source, layer)
        floats = 4 * shape.n_expert_weights
        kept = source.kept_bytes(shape.layers[0])
        assert kept is not None and kept < CODED_SHARE * floats
        assert layer_experts_bytes(source, shape) == shape.experts * kept + 2 * floats


def test_expected_bytes_are_those_of_the_codes_held(tmp_path: Path) -> None:
    coded, _ = write_pair("fp8", tmp_path)
    model = opened(coded)
    with model.checkpoint:
        layer = model.shape.layers[-1]
        weights = model.experts.read_kept(layer, model.shape.experts - 1)
        assert weights is not None
        total = 0
        for weight in weights.values():
            assert isinstance(weight, KeptWeight)
            total += weight.codes.nbytes + weight.scale.nbytes
        assert model.experts.kept_bytes(layer) == total


def test_floats_stay_as_they_are(tmp_path: Path) -> None:
    model = opened(make_tiny_checkpoint("mixtral", tmp_path / "model", dtype="bfloat16"))
    with model.checkpoint:
        shape, layer = model.shape, model.shape.layers[0]
        require_equal(LayerExperts(model.experts, shape, layer), model.experts, layer)
        assert model.experts.kept_bytes(layer) is None
        assert layer_experts_bytes(model.experts, shape) == (
            2 * shape.experts * shape.n_expert_weights
        )
