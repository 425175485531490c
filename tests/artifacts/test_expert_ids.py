"""Flat numbers of experts: one for each pair, and back."""

import numpy as np

from moe_tool.artifacts.expert_ids import FormIds, LayerIds


def test_every_form_of_an_expert_has_a_number_of_its_own() -> None:
    ids = FormIds(5)
    numbers = [ids.number(form, expert) for form in range(3) for expert in range(5)]
    assert numbers == list(range(15))
    assert [ids.pair(number) for number in numbers] == [(f, e) for f in range(3) for e in range(5)]


def test_arrays_are_numbered_elementwise() -> None:
    found = FormIds(4).number(np.array([[0, 2], [1, 0]]), np.array([[3, 1], [0, 2]]))
    assert found.tolist() == [[3, 9], [4, 2]]


def test_layers_are_numbered_by_their_place_among_the_moe_layers() -> None:
    ids = LayerIds((1, 4), 3)
    assert [ids.number(key) for key in ((1, 0), (1, 2), (4, 0), (4, 1))] == [0, 2, 3, 4]
    assert ids.key(4) == (4, 1)
