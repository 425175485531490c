"""Experts in any order of arrival against transformers' eager loop."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moe_tool.experts.combine import _run_tokens, run_experts
from moe_tool.quantization.weights import FloatWeight

N_EXPERTS, HIDDEN = 5, 16


@pytest.fixture(scope="module")
def experts():
    config = MixtralConfig(
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_local_experts=N_EXPERTS,
        experts_implementation="eager",
    )
    module = MixtralExperts(config)
    torch.manual_seed(1)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.requires_grad_(False)


def _supply(module, order):
    def supply(wanted):
        assert wanted == sorted(wanted) and set(wanted) >= set(order)
        for expert in order:
            yield expert, {name: FloatWeight(p[expert]) for name, p in module.named_parameters()}

    return supply


def _wanted(index):
    return [e for e in torch.unique(index).tolist() if 0 <= e < N_EXPERTS]


def test_every_order_of_arrival_gives_the_eager_bits(experts):
    hidden, weight = torch.randn(30, HIDDEN), torch.rand(30, 3)
    index = torch.stack([torch.randperm(N_EXPERTS)[:3] for _ in range(30)])
    expected = experts(hidden, index, weight)
    for order in itertools.permutations(range(N_EXPERTS)):
        found = run_experts(experts, hidden, index, weight, _supply(experts, order))
        assert torch.equal(found, expected)


def test_one_token_gets_the_bits_that_it_gets_among_many(experts):
    hidden, weight = torch.randn(1, HIDDEN), torch.rand(1, 4)
    present = torch.tensor([[True, False, True, True]])
    expected = experts(hidden, torch.tensor([[3, N_EXPERTS, 0, 4]]), weight)
    for second in (1, 3):  # whatever stands in an empty slot
        index = torch.tensor([[3, second, 0, 4]])
        for order in itertools.permutations((0, 3, 4)):
            case = (experts, hidden, index, weight, _supply(experts, order))
            assert torch.equal(run_experts(*case, present=present), expected)
            assert torch.equal(_run_tokens(*case, present), expected)


def test_a_token_that_names_an_expert_twice_gets_it_twice(experts):
    hidden, weight = torch.randn(1, HIDDEN), torch.rand(1, 3)
    index = torch.tensor([[2, 1, 2]])
    expected = experts(hidden, index, weight)
    found = run_experts(experts, hidden, index, weight, _supply(experts, [2, 1]))
    assert torch.equal(found, expected)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_routing_with_empty_slots_equals_the_eager_loop(experts, data):
    n_tokens, top_k = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 4))
    slots = st.lists(st.integers(0, N_EXPERTS), min_size=top_k, max_size=top_k)
    rows = data.draw(st.lists(slots, min_size=n_tokens, max_size=n_tokens))
    index = torch.tensor(rows, dtype=torch.int64).reshape(n_tokens, top_k)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    hidden = torch.randn(n_tokens, HIDDEN, generator=generator)
    weight = torch.rand(n_tokens, top_k, generator=generator)
    order = data.draw(st.permutations(_wanted(index)))
    expected = experts(hidden, index, weight)  # eager skips the index E
    found = run_experts(
        experts,
        hidden,
        index.clamp(max=N_EXPERTS - 1),
        weight,
        _supply(experts, order),
        present=index < N_EXPERTS,
    )
    assert torch.equal(found, expected)


def test_weights_are_not_touched_after_the_next_expert_is_asked_for(experts):
    hidden, weight = torch.randn(6, HIDDEN), torch.rand(6, 2)
    index = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 4], [4, 0], [0, 2]])
    expected = experts(hidden, index, weight)

    def one_buffer(wanted):
        buffers = {name: torch.empty_like(p[0]) for name, p in experts.named_parameters()}
        for expert in (4, 2, 0, 3, 1):
            for name, parameter in experts.named_parameters():
                buffers[name].copy_(parameter[expert])
            yield expert, {name: FloatWeight(buffer) for name, buffer in buffers.items()}
        for buffer in buffers.values():
            buffer.fill_(float("nan"))

    assert torch.equal(run_experts(experts, hidden, index, weight, one_buffer), expected)


def test_a_supply_that_lacks_an_expert_is_a_bug(experts):
    index = torch.tensor([[0, 1]])
    for n_tokens in (1, 2):
        with pytest.raises(AssertionError, match="different experts"):
            run_experts(
                experts,
                torch.randn(n_tokens, HIDDEN),
                index.expand(n_tokens, 2),
                torch.rand(n_tokens, 2),
                _supply(experts, [0]),
            )


def test_a_watcher_sees_what_is_summed(experts):
    for n_tokens in (1, 6):
        hidden, weight = torch.randn(n_tokens, HIDDEN), torch.rand(n_tokens, 3)
        index = torch.stack([torch.randperm(N_EXPERTS)[:3] for _ in range(n_tokens)])
        order = _wanted(index)[::-1]
        seen = {}

        def watch(expert, rows, output, seen=seen):
            seen[expert] = (slice(None) if rows is None else rows), output

        found = run_experts(experts, hidden, index, weight, _supply(experts, order), watch=watch)
        total = torch.zeros_like(hidden)
        for expert in sorted(seen):
            rows, output = seen[expert]
            total[rows] += output
        assert list(seen) == order
        assert torch.equal(found, total)
