"""Toy decoders show which ways of handing on data let layers run alone, and which do not."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from moe_tool.errors import UnsupportedModelError
from moe_tool.models.layer_flow import Boundary, HandedOn, trace_layers

HIDDEN = 6
Forward = Callable[["Toy", torch.Tensor], torch.Tensor]


class Layer(nn.Module):
    """Matrix on the meta device, with an optional second input that it passes on or mixes in."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN, device="meta")

    def forward(self, hidden_states: torch.Tensor, more: Any = None) -> torch.Tensor:
        hidden = hidden_states + self.linear(hidden_states)
        for each in more if isinstance(more, list) else [more]:
            hidden = hidden if each is None else hidden + each
        return hidden


class Choosing(Layer):
    """Layer that hands on integers beside the hidden states."""

    def forward(self, hidden_states: torch.Tensor, more: Any = None) -> Any:
        hidden = super().forward(hidden_states)
        index = hidden.topk(2, dim=-1)[1] if more is None else more
        return hidden.gather(-1, index).sum(-1, keepdim=True) + hidden, index, None


class Toy(nn.Module):
    """Embedding, three layers and a head, called as `forward` says."""

    def __init__(self, forward: Forward, kind: type[Layer] = Layer) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="toy")
        self.embed = nn.Embedding(50, HIDDEN, device="meta")
        self.layers = nn.ModuleList([kind() for _ in range(3)])
        self.own = forward

    def get_decoder(self) -> "Toy":
        return self

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.own(self, input_ids))


def straight(model: Toy, ids: torch.Tensor) -> torch.Tensor:
    hidden = model.embed(ids)
    mask = torch.ones(ids.shape, dtype=torch.bool)
    if (mask.cumsum(-1) > 3).any():  # code that looks at masks has elements to look at
        hidden = hidden * 2
    for layer in model.layers:
        hidden = layer(hidden) * 0.5
    return hidden


def with_indices(model: Toy, ids: torch.Tensor) -> torch.Tensor:
    hidden, index = model.embed(ids), None
    for layer in model.layers:
        hidden, index, _ = layer(hidden, index)
    return hidden


def with_embeddings(model: Toy, ids: torch.Tensor) -> torch.Tensor:
    hidden = model.embed(ids)
    for layer in model.layers:
        hidden = layer(hidden, model.embed(ids))
    return hidden


def head_over_tokens(model: Toy, ids: torch.Tensor) -> torch.Tensor:
    return straight(model, ids) + model.embed(ids)


def from_first_layer(model: Toy, ids: torch.Tensor) -> torch.Tensor:
    first = model.layers[0](model.embed(ids))
    return model.layers[2](model.layers[1](first), first)


def head_over_all(model: Toy, ids: torch.Tensor) -> torch.Tensor:
    first = model.layers[0](model.embed(ids))
    return model.layers[2](model.layers[1](first)) + first


def in_a_list(model: Toy, ids: torch.Tensor) -> torch.Tensor:
    hidden, seen = model.embed(ids), []
    for layer in model.layers:
        hidden = layer(hidden, list(seen))
        seen.append(hidden)
    return hidden


def in_a_buffer(model: Toy, ids: torch.Tensor) -> torch.Tensor:
    hidden = model.embed(ids)
    kept = torch.zeros(3, *hidden.shape)
    for index, layer in enumerate(model.layers):
        hidden = layer(hidden, kept[0] if index == 2 else None)
        kept[index] = hidden
    return hidden


def by_an_element(model: Toy, ids: torch.Tensor) -> torch.Tensor:
    hidden = model.embed(ids)
    return straight(model, ids) if hidden.sum().item() > 0 else hidden


def test_layers_in_a_row_hand_on_hidden_states() -> None:
    flow = trace_layers(Toy(straight), 5)
    assert not flow.needs_tokens and flow.width == HIDDEN
    assert len(flow.boundaries) == 4 and all(each.is_plain for each in flow.boundaries)


def test_indices_travel_beside_the_hidden_states() -> None:
    flow = trace_layers(Toy(with_indices, Choosing), 5)
    assert flow.width == HIDDEN + 2 and not flow.needs_tokens
    assert [each.width for each in flow.boundaries] == [HIDDEN, *[HIDDEN + 2] * 3]
    index = flow.boundaries[1].parts[1]
    assert index is not None and index.dtype == torch.int64 and index.tail == (2,)


@pytest.mark.parametrize("forward", [with_embeddings, head_over_tokens])
def test_token_ids_travel_where_something_looks_at_them(forward: Forward) -> None:
    flow = trace_layers(Toy(forward), 5)
    assert flow.needs_tokens and flow.width == HIDDEN + 1


@pytest.mark.parametrize("forward", [from_first_layer, head_over_all, in_a_list, in_a_buffer])
def test_layers_that_see_earlier_ones_are_refused(forward: Forward) -> None:
    with pytest.raises(UnsupportedModelError, match="need more than the one before"):
        trace_layers(Toy(forward), 5)


def test_code_that_looks_at_activations_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="could not be traced"):
        trace_layers(Toy(by_an_element), 5)


def test_a_boundary_gives_back_what_it_packs() -> None:
    parts = (
        HandedOn(tail=(2, 3), dtype=torch.float32, is_flat=False),
        None,
        HandedOn(tail=(4,), dtype=torch.int64, is_flat=True),
    )
    boundary = Boundary(parts=parts, is_tuple=True)
    given = (torch.randn(2, 5, 2, 3), None, torch.randint(0, 2**24, (10, 4)))
    state = boundary.pack(given)
    assert state.shape == (2, 5, boundary.width) == (2, 5, 10)
    padded = torch.cat([state, torch.ones(2, 5, 3)], dim=-1)
    for found in (boundary.unpack(state), boundary.unpack(padded)):
        assert found[1] is None
        assert torch.equal(found[0], given[0]) and torch.equal(found[2], given[2])
