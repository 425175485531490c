"""Residents by price: against brute force, and by hand."""

import itertools

import numpy as np
import pytest

from moe_tool.policies.cheapest_residents import ExpertUse, cheapest_residents
from moe_tool.policies.misses import LayerBook, PriceBook


def _book(nats, eps, *, buddy=None, buddy_eps=None, sizes):
    n_experts = len(nats)
    none = np.full((n_experts, 0), -1)
    return PriceBook(
        layers={
            0: LayerBook(
                nats=np.array(nats, dtype=float),
                eps=np.array(eps, dtype=float),
                record_bytes=np.repeat([sizes], n_experts, axis=0).T,
                buddy=none if buddy is None else np.array(buddy),
                buddy_scale=np.ones((n_experts, 0 if buddy is None else len(buddy[0]))),
                buddy_eps=none.astype(float) if buddy_eps is None else np.array(buddy_eps),
            )
        },
    )


def _use(squared_gate, load=None):
    load = np.ones(len(squared_gate)) if load is None else np.array(load, dtype=float)
    return {0: ExpertUse(squared_gate=np.array(squared_gate, dtype=float), load=load)}


def _price(book, use, held):
    """Expected nats where held[i] is expert i's level, -1 for none."""
    layer, total = book.layers[0], 0.0
    for i, level in enumerate(held):
        best = 1.0 if level < 0 else min(1.0, layer.eps[level, i]) ** 2
        for j, eps in zip(layer.buddy[i], layer.buddy_eps[i], strict=True):
            if j >= 0 and held[j] == 0:
                best = min(best, eps**2)
        total += use[i] * layer.nats[i] * best
    return total


def test_the_hot_and_the_dear_are_held_and_what_is_left_is_filled():
    book = _book([1, 1, 4, 1], [[0, 0, 0, 0]], sizes=(10,))
    chosen = cheapest_residents(book, _use([0.1, 0.4, 0.2, 0.3]), room_bytes=25)
    assert chosen.by_form == (((0, 2), (0, 1)),)
    assert chosen.nats_per_token == pytest.approx(0.1 + 0.3)


def test_a_cheap_form_of_everybody_beats_the_whole_of_some():
    book = _book([1] * 4, [[0] * 4, [0.1] * 4], sizes=(16, 4))
    chosen = cheapest_residents(book, _use([0.25] * 4), room_bytes=16)
    assert chosen.by_form[0] == () and len(chosen.by_form[1]) == 4
    more = cheapest_residents(book, _use([0.25] * 4), room_bytes=29)
    assert len(more.by_form[0]) == 1 and len(more.by_form[1]) == 3  # one is upgraded


def test_an_expert_that_two_others_can_lean_on_comes_first():
    book = _book(
        [1, 1, 1],
        [[0, 0, 0]],
        buddy=[[1], [-1], [1]],
        buddy_eps=[[0.2], [np.inf], [0.2]],
        sizes=(1,),
    )
    chosen = cheapest_residents(book, _use([0.4, 0.3, 0.3]), room_bytes=1)
    assert chosen.by_form == (((0, 1),),)


def test_what_is_not_stored_is_never_held_and_no_room_holds_nothing():
    book = _book([1, 1], [[0, 0], [np.inf, 0.1]], sizes=(100, 1))
    chosen = cheapest_residents(book, _use([0.9, 0.1]), room_bytes=50)
    assert chosen.by_form == ((), ((0, 1),))
    assert cheapest_residents(book, _use([1, 1]), room_bytes=0).by_form == ((), ())


@pytest.mark.parametrize("seed", range(60))
def test_close_to_the_best_of_all_choices(seed):
    rng = np.random.default_rng(seed)
    n, sizes = 5, (8, 3, 1)
    eps = np.stack([np.zeros(n), rng.uniform(0.05, 0.4, n), rng.uniform(0.4, 1, n)])
    buddy = np.array([[(i + 1) % n, (i + 2) % n] for i in range(n)])
    book = _book(
        rng.uniform(0.2, 2, n),
        eps,
        buddy=buddy,
        buddy_eps=rng.uniform(0.3, 1.1, buddy.shape),
        sizes=sizes,
    )
    use = rng.dirichlet(np.ones(n))
    room = int(rng.integers(4, 34))
    nothing = _price(book, use, [-1] * n)
    best = min(
        _price(book, use, held)
        for held in itertools.product((-1, 0, 1, 2), repeat=n)
        if sum(sizes[level] for level in held if level >= 0) <= room
    )
    chosen = cheapest_residents(book, _use(use), room_bytes=room)
    held = [-1] * n
    for level, keys in enumerate(chosen.by_form):
        for _, expert in keys:
            assert held[expert] == -1
            held[expert] = level
    assert sum(sizes[level] for level in held if level >= 0) <= room
    assert chosen.nats_per_token == pytest.approx(_price(book, use, held))
    # Greedy by the byte may waste the end of a tight budget; of what could be saved it keeps most.
    assert nothing - chosen.nats_per_token >= 0.8 * (nothing - best)


def test_every_expert_has_an_answer_that_needs_no_read_where_there_is_room():
    # 3 is never used in the profile, and 0 so much that its better forms come before anything of 3
    book = _book([1] * 4, [[0] * 4, [0.5] * 4], sizes=(10, 2))
    use = _use([1.0, 0.1, 0.1, 0.0])
    chosen = cheapest_residents(book, use, room_bytes=17)
    assert {key for keys in chosen.by_form for key in keys} == {(0, e) for e in range(4)}
    assert chosen.by_form[0] == ((0, 0),)
    tight = cheapest_residents(book, use, room_bytes=7)
    assert len(tight.by_form[1]) == 3  # no room for all: the unused one is left out


def test_where_reading_is_cheap_memory_is_for_what_is_read_most():
    # 0 matters most where nothing is read; 1 is wanted most often, at small gate weights
    book = _book([1, 1, 1], [[0] * 3], sizes=(10_000_000,))
    use = _use([0.5, 0.2, 0.1], load=[0.5, 0.9, 0.1])
    frozen = cheapest_residents(book, use, room_bytes=10_000_000)
    assert frozen.by_form == (((0, 0),),)
    assert frozen.nats_per_token == pytest.approx(0.2 + 0.1)
    patient = cheapest_residents(book, use, room_bytes=10_000_000, nats_per_mb=0.001)
    assert patient.by_form == (((0, 1),),)
    assert patient.nats_per_token == pytest.approx(0.01 * (0.5 + 0.1))  # 10 MB each time


@pytest.mark.parametrize("nats_per_mb", [0.001, 0.02, 0.3])
@pytest.mark.parametrize("seed", range(15))
def test_close_to_the_best_of_all_choices_where_some_misses_are_read(seed, nats_per_mb):
    rng = np.random.default_rng(seed)
    n, sizes = 5, (8_000_000, 3_000_000, 1_000_000)
    eps = np.stack([np.zeros(n), rng.uniform(0.05, 0.4, n), rng.uniform(0.4, 1, n)])
    book = _book(rng.uniform(0.2, 2, n), eps, sizes=sizes)
    squared, load = rng.dirichlet(np.ones(n)), rng.uniform(0, 1, n)
    room = int(rng.integers(4, 34)) * 1_000_000

    def price(held):
        total = 0.0
        for i, level in enumerate(held):
            whole = squared[i] * book.layers[0].nats[i]
            ways = [
                whole,
                *(whole * min(e, 1.0) ** 2 for e in ([eps[level, i]] if level >= 0 else [])),
            ]
            ways += [
                load[i] * nats_per_mb * size / 1e6 + whole * eps[at, i] ** 2
                for at, size in enumerate(sizes)
            ]
            total += min(ways)
        return total

    nothing = price([-1] * n)
    best = min(
        price(held)
        for held in itertools.product((-1, 0, 1, 2), repeat=n)
        if sum(sizes[level] for level in held if level >= 0) <= room
    )
    chosen = cheapest_residents(book, _use(squared, load), room_bytes=room, nats_per_mb=nats_per_mb)
    held = [-1] * n
    for level, keys in enumerate(chosen.by_form):
        for _, expert in keys:
            held[expert] = level
    assert chosen.nats_per_token == pytest.approx(price(held))
    assert nothing - chosen.nats_per_token >= 0.75 * (nothing - best)
