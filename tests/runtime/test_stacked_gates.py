"""Routers stacked to one matrix choose what each chooses alone."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_tool.models.skeleton import LayerCall
from moe_tool.runtime.prefetcher import RouterPredictor, choose_prefetcher
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import open_session
from moe_tool.runtime.stacked_gates import stack_gates
from tests.tiny_models import TINY

ALONE = {"hunyuan_v1_moe"}
"""Architectures whose routers have no matrix of their own, but a module that has it"""


@pytest.mark.parametrize("arch", TINY)
def test_the_chosen_experts_are_those_of_one_router_at_a_time(
    arch: str, tiny_bundle: Callable[..., Path]
) -> None:
    options = run_options(memory="40%", prefetch="stacked:depth=2", context=64)
    with open_session(tiny_bundle(arch), options) as session:
        layers = session.skeleton.layers
        prefetcher = session.runner.prefetcher
        assert prefetcher is not None
        assert isinstance(prefetcher.predictor, RouterPredictor) == (arch in ALONE)
        if arch in ALONE:
            return
        one_by_one = RouterPredictor(
            following={each.layer: layers[at + 1 : at + 3] for at, each in enumerate(layers)}
        )
        hidden = torch.randn(200, session.manifest.shape.hidden, generator=_seeded())
        calls = [
            LayerCall(
                layer=modules.layer,
                module=modules.experts,
                hidden=hidden,
                index=torch.zeros(200, 2, dtype=torch.int64),
                weight=torch.zeros(200, 2),
                router_logits=None,
            )
            for modules in layers
        ]
        with torch.inference_mode():
            for at, call in enumerate(calls):
                found = list(prefetcher.predictor.predict(call))
                wanted = list(one_by_one.predict(call))
                assert [each.layer for each in found] == [each.layer for each in wanted]
                assert len(found) == min(2, len(layers) - 1 - at)
                for one, other in zip(found, wanted, strict=True):
                    order, others = np.argsort(one.index, 1), np.argsort(other.index, 1)
                    index = np.take_along_axis(one.index, order, 1)
                    assert (index == np.take_along_axis(other.index, others, 1)).all()
                    weight = np.take_along_axis(one.weight, order, 1)
                    np.testing.assert_allclose(
                        weight, np.take_along_axis(other.weight, others, 1), rtol=1e-4, atol=1e-5
                    )
        assert stack_gates(layers, {}) is None


def test_routers_that_differ_or_do_more_than_a_product_are_asked_one_by_one(
    tiny_bundle: Callable[..., Path],
) -> None:
    options = run_options(memory="40%", prefetch="stacked:depth=2", context=64)
    with open_session(tiny_bundle("mixtral"), options) as session:
        layers, rules = session.skeleton.layers, session.plan.policy.rules
        assert stack_gates(layers, rules) is not None
        single = choose_prefetcher("next-layer", layers, rules)
        assert single is not None and isinstance(single.predictor, RouterPredictor)

        class Doubled(torch.nn.Module):
            """A router that scales its input first."""

            def __init__(self, router: torch.nn.Module) -> None:
                super().__init__()
                self.router, self.weight = router, router.weight

            def forward(self, hidden: torch.Tensor) -> object:
                return self.router(2 * hidden)

        other = replace(layers[-1], router=Doubled(layers[-1].router))
        assert stack_gates([*layers[:-1], other], rules) is None
        shorter = torch.nn.Module()
        shorter.weight = torch.nn.Parameter(layers[0].router.weight[:, :-1].clone())
        assert stack_gates([replace(layers[0], router=shorter), *layers[1:]], rules) is None
        lines = {line.name: line.size_bytes for line in session.plan.memory.lines}
        held = stack_gates(layers, rules).weight  # type: ignore[union-attr]
        assert lines["stacked gates"] == held.numel() * held.element_size()


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)
