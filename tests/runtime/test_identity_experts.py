"""Slots that name no stored expert stay empty, whatever else is numbered like them."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moe_tool.artifacts.routing import Answers, Routing, leave_out
from moe_tool.artifacts.run_stats import PhaseCounters
from moe_tool.models.skeleton import LayerCall
from moe_tool.policies.misses import MissPolicy, PolicyInputs, parse_miss_policy
from moe_tool.quantization.weights import ExpertWeights, FloatWeight
from moe_tool.runtime.moe_layer import Forward, MoeLayerRunner
from moe_tool.runtime.policy_choice import ChosenPolicy

E, HIDDEN, LAYER = 4, 16, 2


class _TwoForms:
    """Every expert in two forms; the second one is the expert times ten."""

    hints: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, module: Any, resident: np.ndarray) -> None:
        self.module, self._resident = module, resident
        self.named: list[int] = []

    def resident(self, layer: int) -> np.ndarray:
        return self._resident

    def acquire(
        self, layer: int, numbers: Sequence[int], counters: PhaseCounters, *, scores: Any = None
    ) -> Iterator[tuple[int, ExpertWeights]]:
        self.named = list(numbers)
        for number in numbers:
            form, expert = divmod(number, E)
            factor = 10.0 if form else 1.0
            named = self.module.named_parameters()
            yield (
                number,
                ExpertWeights({name: FloatWeight(p[expert] * factor) for name, p in named}),
            )


class _SecondForm(MissPolicy):
    """Answers each missing expert by its second form, and drops one slot in three."""

    def describe(self) -> str:
        return ""

    def decide(self, routing: Routing, resident: np.ndarray) -> Answers:
        is_left_out = np.zeros(routing.index.shape, dtype=bool)
        is_left_out[:, 2] = True
        form = np.where(resident[0][routing.index], 0, 1)
        return leave_out(routing, is_left_out, form)


@pytest.fixture
def module() -> Any:
    config = MixtralConfig(
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_local_experts=E,
        experts_implementation="eager",
    )
    made = MixtralExperts(config)
    torch.manual_seed(1)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.requires_grad_(False)


def _runner(
    module: Any, policy: MissPolicy, resident: np.ndarray, *, n_sequences: int = 1, **options: Any
) -> Any:
    chosen = ChosenPolicy(
        choice=parse_miss_policy("exact"), policy=policy, is_lossy=True, prices=None, rules={}
    )
    store: Any = _TwoForms(module, resident)
    return MoeLayerRunner(
        store=store,
        residency="cache",
        policy=chosen,
        forward=Forward(phase="decode", n_sequences=n_sequences),
        record_bytes={LAYER: np.full((2, E), 100)},
        **options,
    )


def _call(module: Any, index: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> Any:
    return LayerCall(
        layer=LAYER,
        module=module,
        hidden=hidden,
        index=index,
        weight=weight,
        router_logits=None,
    )


@pytest.mark.parametrize("n_tokens", [1, 3])
def test_an_identity_expert_is_not_the_first_expert_of_another_form(
    module: Any, n_tokens: int
) -> None:
    hidden, weight = torch.randn(n_tokens, HIDDEN), torch.rand(n_tokens, 4)
    index = torch.tensor([[1, E, 0, 3]]).repeat(n_tokens, 1)
    expected = module(hidden, index, weight)  # transformers leaves out E as well
    resident = np.ones((2, E), dtype=bool)
    exact = parse_miss_policy("exact").make(PolicyInputs())
    runner = _runner(module, exact, resident)
    assert torch.equal(runner(_call(module, index, hidden, weight)), expected)
    assert runner.store.named == [0, 1, 3]

    resident[0, 3] = False
    runner = _runner(module, _SecondForm(), resident, n_sequences=n_tokens)
    found = runner(_call(module, index, hidden, weight))
    assert runner.store.named == [1, E + 3]
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj"):
            getattr(module, name)[3] *= 10
    left = torch.tensor([[1, E, E, 3]]).repeat(n_tokens, 1)
    torch.testing.assert_close(found, module(hidden, left, weight))
    assert runner.stats.decode == PhaseCounters(
        hits=2, misses=1, replica_answers=n_tokens, drops=n_tokens
    )


@pytest.mark.parametrize("n_tokens", [1, 3])
def test_a_removed_expert_runs_in_no_form_and_is_no_access(module: Any, n_tokens: int) -> None:
    hidden, weight = torch.randn(n_tokens, HIDDEN), torch.rand(n_tokens, 4)
    index = torch.tensor([[1, 2, 0, 3]]).repeat(n_tokens, 1)
    resident = np.ones((2, E), dtype=bool)
    resident[:, 2] = False
    stored = {LAYER: torch.tensor([True, True, False, True])}
    expected = module(hidden, torch.where(index == 2, E, index), weight)
    exact = parse_miss_policy("exact").make(PolicyInputs())
    runner = _runner(module, exact, resident, stored=stored)
    assert torch.equal(runner(_call(module, index, hidden, weight)), expected)

    runner = _runner(module, _SecondForm(), resident, stored=stored, n_sequences=n_tokens)
    runner(_call(module, index, hidden, weight))
    assert runner.store.named == [1, 3]
    assert runner.stats.decode == PhaseCounters(hits=3, drops=n_tokens)
