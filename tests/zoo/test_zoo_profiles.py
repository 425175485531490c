"""Profiles of models whose layers hand on more than hidden states, or whose routers are unusual."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from moe_tool.errors import UnsupportedModelError
from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.models.locate import LocatedModel
from moe_tool.models.moe_layers import find_moe_layers
from moe_tool.profiling.recorder import ProfileReport, record_profile
from moe_tool.text.sources import parse_sources
from tests.zoo.test_zoo import make_checkpoint

# latents narrower than the router's input; token ids, streams and a hash router; indices that
# grow with the sequence; a router that takes batches
UNUSUAL = ("nemotron_h (latent experts)", "deepseek_v4", "glm_moe_dsa", "afmoe")


def record(folder: Path, out: Path) -> ProfileReport:
    return record_profile(
        LocatedModel(folder=folder, name="zoo"),
        parse_sources(["builtin"]),
        out=out,
        tokens=280,
        seq_len=140,  # longer than the watched sequences
        memory_bytes=8 * 2**30,
    )


@torch.no_grad()
def routing_of(model: PreTrainedModel, ids: np.ndarray) -> dict[int, torch.Tensor]:
    """Return the experts that the whole model chooses, layer -> [T, K]."""
    seen: dict[int, torch.Tensor] = {}
    for modules in find_moe_layers(model):

        def hook(module: Any, inputs: Any, output: Any, modules: Any = modules) -> None:
            seen[modules.layer] = modules.read_output(output).index

        modules.router.register_forward_hook(hook)
    model(input_ids=torch.from_numpy(ids.astype(np.int64)), use_cache=False)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("name", UNUSUAL)
def test_the_recorded_routing_is_that_of_the_whole_model(name: str, tmp_path: Path) -> None:
    folder, model = make_checkpoint(name, tmp_path / "model")
    record(folder, tmp_path / "p.h5")
    with ProfileReader.open(tmp_path / "p.h5") as profile:
        wanted = routing_of(model, profile.tokens.ids)
        assert set(wanted) == set(profile.layers)
        for layer in profile.layers:
            found = np.sort(profile.trace(layer).top_k_index, 1)
            same = (found == np.sort(wanted[layer].numpy(), 1)).all(1)
            assert same.mean() > 0.99  # products of other shapes are rounded otherwise
            assert profile.statistics(layer).sensitivity > 0


@pytest.mark.slow
def test_a_router_that_may_choose_no_expert_is_not_recorded(tmp_path: Path) -> None:
    folder, _ = make_checkpoint("zaya", tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match="choose among 9, and it has 8 experts"):
        record(folder, tmp_path / "p.h5")
