"""What bits cost, measured by the tool, against the ordinary model with rounded weights in it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from transformers import AutoModelForCausalLM

from moe_tool.artifacts.bit_prices import BitPrices
from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.models.locate import LocatedModel
from moe_tool.packing.measure_bit_prices import measure_bit_prices
from moe_tool.planning.allocate_bits import WIDTHS
from moe_tool.planning.bit_costs import BitCosts, bit_costs
from moe_tool.planning.mixed_allocations import (
    allocate_average,
    allocate_within,
    control_allocations,
    describe,
    layer_bits,
)
from moe_tool.planning.plan_sources import read_sources
from moe_tool.profiling.recorder import record_profile
from moe_tool.quantization.round_to_nearest import dequantize, quantize
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import open_session
from moe_tool.text.sources import parse_sources
from tests.packed import pack_bundle
from tests.planning.made_plan import made_plan

BITS = 2.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A tiny model with its profile and the prices of its bits."""

    model: LocatedModel
    profile: ProfileReader
    prices: BitPrices
    costs: BitCosts
    ordinary: Any
    """The checkpoint as transformers loads it"""
    inputs: list[torch.Tensor] = field(default_factory=list)
    """[N, S, H] of each layer's experts, for the profile's tokens"""

    def ids(self) -> torch.Tensor:
        """The profile's tokens, [N, S]."""
        return torch.from_numpy(self.profile.tokens.ids.astype(np.int64))

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """The ordinary model's, [N, S, V] float64 logarithms."""
        with torch.inference_mode():
            found: torch.Tensor = self.ordinary(ids).logits.double().log_softmax(-1)
        return found


@pytest.fixture(scope="module")
def measured(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Measured]:
    model = LocatedModel(folder=tiny_checkpoint("mixtral"), name="tiny")
    path = tmp_path_factory.mktemp("measured") / "p.h5"
    record_profile(model, parse_sources(["builtin"]), out=path, tokens=1024, seq_len=32)
    with ProfileReader.open(path) as profile:
        prices = measure_bit_prices(model, profile, "rtn")
        found = Measured(
            model=model,
            profile=profile,
            prices=prices,
            costs=bit_costs(read_sources(profile), prices),
            ordinary=AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32),
        )
        hooks = [
            layer.mlp.register_forward_pre_hook(lambda _, given: found.inputs.append(given[0]))
            for layer in found.ordinary.model.layers
        ]
        found.logits(found.ids())
        for hook in hooks:
            hook.remove()
        yield found


def _rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    return dequantize(quantize(weight, bits))


def _answer(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up) @ down.T


@torch.no_grad()
def test_an_experts_error_is_that_of_its_answers_to_held_out_tokens(measured: Measured) -> None:
    held_out = torch.from_numpy(measured.profile.tokens.held_out)
    for at, layer in enumerate(measured.ordinary.model.layers):
        x = measured.inputs[at][held_out].flatten(0, 1)
        wanted = (x @ layer.mlp.gate.weight.T).topk(2, dim=-1).indices
        experts = layer.mlp.experts
        for expert in range(8):
            own = x[(wanted == expert).any(dim=1)]
            own = own if len(own) >= 8 else x  # too few to judge by
            matrices = experts.gate_up_proj[expert], experts.down_proj[expert]
            truth = _answer(own, *matrices)
            for row, bits in enumerate(measured.prices.widths):
                lost = _answer(own, *(_rounded(each, bits) for each in matrices)) - truth
                eps = float(lost.square().sum().sqrt() / truth.square().sum().sqrt())
                # The tool's own forward rounds inputs to 8 bits too.
                assert measured.prices.layers[at].eps[row][expert] == pytest.approx(eps, rel=0.03)


def test_what_is_felt_of_a_layer_is_the_models_divergence_with_two_bits_there(
    measured: Measured,
) -> None:
    ids = measured.ids()[torch.from_numpy(~measured.profile.tokens.held_out)]
    exact = measured.logits(ids)
    felt = [each.kl_ratio for each in measured.prices.layers]
    for at, layer in enumerate(measured.ordinary.model.layers):
        matrices = (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj)
        kept = [each.detach().clone() for each in matrices]
        with torch.no_grad():
            for each in matrices:
                each.copy_(torch.stack([_rounded(one, 2) for one in each]))
            disturbed = measured.logits(ids)
            for each, old in zip(matrices, kept, strict=True):
                each.copy_(old)
        found = float((exact.exp() * (exact - disturbed)).sum(-1).mean())
        assert found > 0.01
        assert felt[at] * _expected(measured, at, 2).sum() == pytest.approx(found, rel=0.05)
    assert max(felt) > 1.1 * min(felt)  # or the factor would say nothing


def _expected(measured: Measured, at: int, bits: int) -> np.ndarray:
    """Nats of each expert by the profile alone: KL per squared relative error of the layer, times
    the share of the layer's output that the expert's error is."""
    profile, layer = measured.profile, measured.profile.header.shape.layers[at]
    statistics = profile.statistics(layer)
    index, gates = profile.indices(layer, "top_k_index"), profile.gate_weights(layer)
    eps = measured.prices.layers[at].eps[measured.prices.widths.index(bits)]
    found = []
    for expert in range(8):
        squared = np.where(index == expert, gates.astype(np.float64), 0.0) ** 2
        share = squared.sum() / len(index) * float(statistics.probe.output_ratio[expert]) ** 2
        found.append(statistics.sensitivity * share * eps[expert] ** 2)
    return np.array(found)


def test_each_experts_cost_is_what_is_felt_of_it(measured: Measured) -> None:
    for at, layer in enumerate(measured.prices.layers):
        for bits in measured.prices.widths:
            np.testing.assert_allclose(
                measured.costs.nats[at, :, WIDTHS.index(bits)],
                layer.kl_ratio * _expected(measured, at, bits),
                rtol=1e-5,
            )
    assert (measured.costs.nats[..., WIDTHS.index(16)] == 0).all()


def _integer_program(
    objective: np.ndarray, limited: np.ndarray, room: float
) -> tuple[float, np.ndarray]:
    """The least sum of an objective, [n, W] each, with one choice each and a limited sum."""
    n, n_choices = objective.shape
    one_each = np.kron(np.eye(n), np.ones(n_choices))
    scale = float(objective.max())
    found = milp(
        objective.ravel() / scale,
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(limited.reshape(1, -1) / room, -np.inf, 1.0),
        ],
        integrality=np.ones(objective.size),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    return float(found.fun) * scale, found.x.reshape(n, n_choices).argmax(axis=1)


def _by_hand(measured: Measured) -> np.ndarray:
    """[L * E, W]: what each width costs, not by `bit_costs`."""
    parts = []
    for at, layer in enumerate(measured.prices.layers):
        columns = {bits: layer.kl_ratio * _expected(measured, at, bits) for bits in (1, 2, 3, 4)}
        parts.append(np.stack([columns.get(w, np.full(8, np.inf)) for w in WIDTHS], axis=1))
    return np.concatenate(parts)


def test_the_bits_of_an_average_are_the_best_there_are(measured: Measured) -> None:
    chosen = allocate_average(measured.costs, BITS)
    found = describe("found", measured.costs, chosen)
    cost = measured.costs.nats.reshape(-1, len(WIDTHS)).copy()
    by_hand = _by_hand(measured)
    known = np.isfinite(by_hand)
    cost[known] = by_hand[known]
    sizes = np.tile(np.array(WIDTHS, float), (len(cost), 1))
    best, _ = _integer_program(cost, sizes, BITS * len(cost))
    assert found.average_bits <= BITS
    assert cost[np.arange(len(cost)), chosen.ravel()].sum() == pytest.approx(best, rel=1e-6)
    assert found.nats == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("limit", [0.001, 0.1])
def test_no_fewer_bytes_keep_a_limit_of_loss(measured: Measured, limit: float) -> None:
    chosen = allocate_within(measured.costs, limit)
    assert chosen is not None
    found = describe("found", measured.costs, chosen)
    cost = measured.costs.nats.reshape(-1, len(WIDTHS))
    sizes = np.tile(measured.costs.size_bytes.astype(float), (len(cost), 1))
    least, _ = _integer_program(sizes, cost, limit)
    assert found.nats <= limit
    assert found.expert_bytes == pytest.approx(least, abs=1)


def test_packed_bits_lose_less_than_as_many_handed_out_otherwise(
    measured: Measured, tmp_path: Path
) -> None:
    """Measured: KL(checkpoint || bundle) on text that the profile has not seen."""
    ids = torch.randint(0, 256, (8, 48), generator=torch.Generator().manual_seed(5))
    exact = measured.logits(ids)
    choices = {
        "best": allocate_average(measured.costs, BITS),
        **control_allocations(measured.costs, BITS),
    }
    lost = {}
    for name, chosen in choices.items():
        plan = made_plan(
            identity=measured.profile.header.identity,
            bits="mixed",
            expert_bits=layer_bits(measured.costs, measured.profile.header.shape.layers, chosen),
        )
        pack_bundle(measured.model, out=tmp_path / name, bits="mixed", plan=plan)
        options = run_options(memory="100%", context=48, batch=8)
        with open_session(tmp_path / name, options) as session, torch.inference_mode():
            found = session.model(input_ids=ids).logits.double().log_softmax(-1)
        kl = (exact.exp() * (exact - found)).sum(-1).mean(-1)  # [N]
        lost[name] = kl
    best = lost.pop("best")
    assert lost.keys() >= {"uniform", "random", "by frequency"}
    for name, kl in lost.items():
        gained = kl - best
        assert gained.mean() > 3 * gained.std() / len(gained) ** 0.5, name
